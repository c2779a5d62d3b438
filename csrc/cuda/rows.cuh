// What gather_rows and scatter_rows share: whole rows moved by one warp each, in words of 16 bytes or of one element.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kRowThreads = 256;  // a warp a row
constexpr int kRowsPerBlock = kRowThreads / kWarp;
constexpr int kRowUnroll = 4;  // words in flight per lane

// The elements lane `first`, `first + 32`, ... of a row: all loads of a chunk are issued before its stores.
template <class Word>
__device__ inline void copy_row(const Word* __restrict__ from, Word* __restrict__ to, int words, int lane) {
  for (int first = lane; first < words; first += kWarp * kRowUnroll) {
    Word word[kRowUnroll];
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (first + u * kWarp < words) word[u] = from[first + u * kWarp];
    }
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (first + u * kWarp < words) to[first + u * kWarp] = word[u];
    }
  }
}

}  // namespace cascade
