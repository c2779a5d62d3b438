// rotate_rows: rotary positions of each token's heads, put where attention wants them in the same pass; and back.
//
// Shape legend: K tokens, H heads, E head size, F = E / 2, Y = K * H, P rows of E numbers.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kRotateThreads = 256;
constexpr int kMaxAngles = 4096;  // cosines and sines that a block holds, 16 KB

template <class T>
struct RotatedRows {
  typename T::Bits *x_KHE, *rows_PE;  // rows contiguous; x's heads, too
  const typename T::Bits* into_PE;
  const float *cos_KF, *sin_KF;  // contiguous; null: nothing is turned
  const int64_t* index_Y;
  const int32_t* slot_P;  // below 0: the row is that of `into`; null: all are
  int64_t x_stride, into_stride, tokens, placed, rows;  // elements; tokens of x; those that stand somewhere; P
  int64_t turn_blocks;  // the blocks beyond copy `into`
  int heads, half, block_tokens, block_rows;
};

// One word of each half of a head, turned by the token's angles.
template <class T, int kBytes>
__device__ inline void turn_words(typename WordOf<kBytes>::type& first, typename WordOf<kBytes>::type& second,
                                  const float* cos, const float* sin, float sign) {
  using Pack = Elements<T, kBytes>;
  Pack a(first), b(second);
#pragma unroll
  for (int i = 0; i < Pack::kCount; ++i) {
    const float x = a.value[i], y = b.value[i], s = sign * sin[i];
    a.value[i] = x * cos[i] - y * s;
    b.value[i] = y * cos[i] + x * s;
  }
  first = a.word(), second = b.word();
}

// x to rows, turned; with kBack rows to x, turned back, zero of tokens that stand nowhere. A block takes some tokens
// with all heads, so that their angles are read once. The blocks beyond copy the rows of `into` that are kept.
// With kBytes = 16 every half of a head starts on 16 bytes.
template <class T, int kBytes, bool kBack>
__global__ void __launch_bounds__(kRotateThreads) rotate_rows_kernel(const RotatedRows<T> all) {
  using Word = typename WordOf<kBytes>::type;
  constexpr int kCount = Elements<T, kBytes>::kCount;
  const int words = all.half / kCount;
  if (!kBack && blockIdx.x >= all.turn_blocks) {
    const int64_t first = (blockIdx.x - all.turn_blocks) * all.block_rows;
    const int rows = static_cast<int>(min(static_cast<int64_t>(all.block_rows), all.rows - first));
    for (int at = threadIdx.x; at < rows * words; at += kRotateThreads) {
      const int64_t row = first + at / words;
      if (all.slot_P != nullptr && all.slot_P[row] >= 0) continue;
      const Word* from = reinterpret_cast<const Word*>(all.into_PE + row * all.into_stride) + at % words;
      Word* to = reinterpret_cast<Word*>(all.rows_PE + row * all.half * 2) + at % words;
      const Word word = from[0], other = from[words];
      to[0] = word, to[words] = other;
    }
    return;
  }
  extern __shared__ float angles[];  // cosines, then sines
  const int64_t first = blockIdx.x * static_cast<int64_t>(all.block_tokens);
  const int tokens = static_cast<int>(min(static_cast<int64_t>(all.block_tokens), all.tokens - first));
  const int placed = static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(tokens), all.placed - first)));
  const int numbers = placed * all.half;
  const bool turned = all.cos_KF != nullptr;
  if (turned) {
    for (int at = threadIdx.x; at < numbers; at += kRotateThreads) {
      angles[at] = all.cos_KF[first * all.half + at];
      angles[numbers + at] = all.sin_KF[first * all.half + at];
    }
    __syncthreads();
  }
  const int token_words = all.heads * words;
  for (int at = threadIdx.x; at < (kBack ? tokens : placed) * token_words; at += kRotateThreads) {
    const int token = at / token_words, head = at % token_words / words, word = at % words;
    const int64_t k = first + token;
    Word* x = reinterpret_cast<Word*>(all.x_KHE + k * all.x_stride + static_cast<int64_t>(head) * all.half * 2) + word;
    const int64_t row = token < placed ? all.index_Y[k * all.heads + head] : -1;
    const bool there = row >= 0 && row < all.rows;
    if (!kBack && !there) continue;
    Word* place = reinterpret_cast<Word*>(all.rows_PE + row * all.half * 2) + word;
    Word one{}, other{};
    if (there) {
      const Word* from = kBack ? place : x;
      one = from[0], other = from[words];
      const float* cos = angles + token * all.half + word * kCount;
      if (turned) turn_words<T, kBytes>(one, other, cos, cos + numbers, kBack ? -1.f : 1.f);
    }
    Word* to = kBack ? x : place;
    to[0] = one, to[words] = other;
  }
}

}  // namespace cascade
