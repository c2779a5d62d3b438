// cosine_score: score_N[n] = <a_n, b_n> / (|a_n| |b_n| + 1e-8), one warp a row, one pass over both inputs.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kScoreThreads = 256;  // 8 rows a block
constexpr int kScoreUnroll = 4;     // words of each input in flight per lane
constexpr float kCosineEps = 1e-8f;

// a_ND, b_ND: rows of `dim` elements, `stride` elements apart. With kBytes = 16 every row starts on 16 bytes.
template <class T, int kBytes>
__global__ void __launch_bounds__(kScoreThreads) cosine_score_kernel(
    const typename T::Bits* __restrict__ a_ND, int64_t a_stride, const typename T::Bits* __restrict__ b_ND,
    int64_t b_stride, float* __restrict__ score_N, int64_t rows, int dim) {
  using Pack = Elements<T, kBytes>;
  using Word = typename Pack::Word;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kScoreThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const auto* a_D = a_ND + row * a_stride;
  const auto* b_D = b_ND + row * b_stride;

  float dot = 0.f, aa = 0.f, bb = 0.f;
  const auto add = [&](float a, float b) {
    dot = fmaf(a, b, dot);
    aa = fmaf(a, a, aa);
    bb = fmaf(b, b, bb);
  };

  const int words = dim / Pack::kCount;
  for (int first = lane; first < words; first += kWarp * kScoreUnroll) {
    Word a_word[kScoreUnroll] = {}, b_word[kScoreUnroll] = {};  // words past the end stay 0 and add nothing
#pragma unroll
    for (int u = 0; u < kScoreUnroll; ++u) {
      const int at = first + u * kWarp;
      if (at < words) {
        a_word[u] = reinterpret_cast<const Word*>(a_D)[at];
        b_word[u] = reinterpret_cast<const Word*>(b_D)[at];
      }
    }
#pragma unroll
    for (int u = 0; u < kScoreUnroll; ++u) {
      const Pack a(a_word[u]), b(b_word[u]);
#pragma unroll
      for (int i = 0; i < Pack::kCount; ++i) add(a.value[i], b.value[i]);
    }
  }
  // Columns that do not fill a word (none when a word is one element).
  for (int d = words * Pack::kCount + lane; d < dim; d += kWarp) add(T::load(a_D[d]), T::load(b_D[d]));

  dot = warp_reduce<Sum>(dot);
  aa = warp_reduce<Sum>(aa);
  bb = warp_reduce<Sum>(bb);
  if (lane == 0) score_N[row] = dot / (sqrtf(aa) * sqrtf(bb) + kCosineEps);
}

}  // namespace cascade
