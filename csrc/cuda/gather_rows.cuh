// gather_rows: rows of hidden states, and the same entries of the small arrays that travel with them.
#pragma once

#include "rows.cuh"

namespace cascade {

constexpr int kMaxCarried = 8;  // carried arrays served by one launch

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
    const int64_t to = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarp;
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

}  // namespace cascade
