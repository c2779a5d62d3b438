// scatter_rows: a copy of `into` with some rows replaced, or increased. An inverse index says where a row comes from.
#pragma once

#include "rows.cuh"

namespace cascade {

// slot_N[index_K[k]] = k; slot_N comes filled with -1. An index out of range writes nothing.
__global__ void __launch_bounds__(kRowThreads) scatter_rows_invert_kernel(
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
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarp;
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
