// gather_rows and scatter_rows: whole rows moved by one warp each, in words of 16 bytes or of one element.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kRowThreads = 256;  // 8 rows a block
constexpr int kRowUnroll = 4;     // words in flight per lane
constexpr int kMaxCarried = 8;    // carried arrays served by one launch

// One (N,) array that travels with the rows; element sizes 1, 2, 4, 8 and 16.
struct Carried {
  const void* from_N;
  void* to_K;
  int64_t stride;  // elements
  int64_t size;    // bytes of an element
};

struct CarriedList {
  Carried array[kMaxCarried];
  int64_t count;
};

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

template <class E>
__device__ inline void copy_element(const Carried& array, int64_t from, int64_t to) {
  static_cast<E*>(array.to_K)[to] = static_cast<const E*>(array.from_N)[from * array.stride];
}

// hidden_KW[k] = hidden_NW[index_K[k]]: W words a row, `stride` words apart. The first `row_blocks` blocks move rows;
// the others move the carried arrays, one thread an index, so that they cost no launch of their own.
template <class Word>
__global__ void __launch_bounds__(kRowThreads) gather_rows_kernel(
    const Word* __restrict__ hidden_NW, int64_t stride, const int64_t* __restrict__ index_K,
    Word* __restrict__ hidden_KW, int64_t rows, int words, int64_t row_blocks, const CarriedList carried) {
  if (blockIdx.x < row_blocks) {
    const int lane = threadIdx.x % kWarp;
    const int64_t to = blockIdx.x * static_cast<int64_t>(kRowThreads / kWarp) + threadIdx.x / kWarp;
    if (to < rows) copy_row(hidden_NW + index_K[to] * stride, hidden_KW + to * words, words, lane);
    return;
  }
  const int64_t to = (blockIdx.x - row_blocks) * kRowThreads + threadIdx.x;
  if (to >= rows) return;
  const int64_t from = index_K[to];
#pragma unroll 1
  for (int64_t i = 0; i < carried.count; ++i) {
    const Carried& array = carried.array[i];
    switch (array.size) {
      case 1: copy_element<uint8_t>(array, from, to); break;
      case 2: copy_element<uint16_t>(array, from, to); break;
      case 4: copy_element<uint32_t>(array, from, to); break;
      case 8: copy_element<uint64_t>(array, from, to); break;
      case 16: copy_element<uint4>(array, from, to); break;
    }
  }
}

// slot_N[index_K[k]] = k; slot_N comes filled with -1. An index out of range writes nothing.
__global__ void __launch_bounds__(kRowThreads) invert_index_kernel(
    const int64_t* __restrict__ index_K, int64_t k, int32_t* __restrict__ slot_N, int64_t rows) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kRowThreads) + threadIdx.x;
  if (at >= k) return;
  const int64_t row = index_K[at];
  if (row >= 0 && row < rows) slot_N[row] = static_cast<int32_t>(at);
}

// out_ND[n] = into_ND[n] where slot_N[n] < 0, else rows_KD[slot_N[n]] (plus into_ND[n], in float32, with `add`).
// Every input row is read only where it reaches the output. slot_N is null when nothing is put back.
template <class T, int kBytes>
__global__ void __launch_bounds__(kRowThreads) scatter_rows_kernel(
    const typename Elements<T, kBytes>::Word* __restrict__ rows_KW, int64_t rows_stride,
    const int32_t* __restrict__ slot_N, const typename Elements<T, kBytes>::Word* __restrict__ into_NW,
    int64_t into_stride, typename Elements<T, kBytes>::Word* __restrict__ out_NW, int64_t rows, int words, int add) {
  using Pack = Elements<T, kBytes>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t slot = slot_N == nullptr ? -1 : slot_N[row];
  const auto* into_W = into_NW + row * into_stride;
  const auto* rows_W = slot < 0 ? nullptr : rows_KW + slot * rows_stride;
  auto* out_W = out_NW + row * words;
  if (slot < 0 || !add) return copy_row(slot < 0 ? into_W : rows_W, out_W, words, lane);
  for (int at = lane; at < words; at += kWarp) {
    Pack sum(into_W[at]);
    const Pack term(rows_W[at]);
#pragma unroll
    for (int i = 0; i < Pack::kCount; ++i) sum.value[i] += term.value[i];
    out_W[at] = sum.word();
  }
}

}  // namespace cascade
