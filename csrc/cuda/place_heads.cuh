// place_heads and take_heads: heads of tokens to the places where attention reads them, rotary positions on the way, and
// back. Every place is written: with a token's head, with what is there already, or with zero.
//
// A place n of sequence b has a row for each head g * T + t, where (B, G, T * N, E) has it, whatever its strides.
//
// Shape legend: K tokens, B sequences, N places of each, H heads, G groups, T = H / G, E head size, F = E / 2.
#pragma once

#include "rotate_rows.cuh"

namespace cascade {

// What is placed in one go, or taken: all heads of the queries, of the keys, or of the values.
template <class T>
struct HeadsPart {
  typename T::Bits *x_KHE, *rows;        // heads of x contiguous
  const typename T::Bits* into_PE;       // P = B * H * N, what is there already; null: zero
  const int32_t* token_BN;               // placing: which token stands there; below 0: none
  const int64_t* place_K;                // taking: b * N + n
  int64_t x_stride, b_stride, g_stride, n_stride, into_stride;  // elements
  int64_t tokens, places;                // K, and B * N
  int64_t first_block;
  int heads, times, row_places, block_units;  // H, T, N; places of a block, or tokens
  float scale;                           // of what is turned
  bool turned;
};

template <class T>
struct PlacedHeads {
  HeadsPart<T> part[3];
  const float *cos_KF, *sin_KF;
  int parts, half;
};

// One block takes some places of one part with all their heads, or tokens with kBack, so that it reads their angles
// once. With kBytes = 16 every half of a head starts on 16 bytes.
template <class T, int kBytes, bool kBack>
__global__ void __launch_bounds__(kRotateThreads, 4) place_heads_kernel(const PlacedHeads<T> all) {
  using Word = typename WordOf<kBytes>::type;
  constexpr int kCount = Elements<T, kBytes>::kCount;
  __shared__ int64_t other[kRotateThreads];  // the token of each place, or the place of each token; -1: none
  extern __shared__ float angles[];          // cosines, then sines
  int number = 0;
  while (number + 1 < all.parts && blockIdx.x >= all.part[number + 1].first_block) ++number;
  const HeadsPart<T>& part = all.part[number];
  const int64_t first = (blockIdx.x - part.first_block) * part.block_units;
  const int64_t left = (kBack ? part.tokens : part.places) - first;
  const int units = static_cast<int>(min(static_cast<int64_t>(part.block_units), left));
  const int words = all.half / kCount, numbers = units * all.half;
  for (int unit = threadIdx.x; unit < units; unit += kRotateThreads) {
    const int64_t index = kBack ? part.place_K[first + unit] : static_cast<int64_t>(part.token_BN[first + unit]);
    other[unit] = index >= 0 && index < (kBack ? part.places : part.tokens) ? index : -1;
  }
  __syncthreads();
  if (part.turned) {
    for (int at = threadIdx.x; at < numbers; at += kRotateThreads) {
      const int unit = at / all.half;
      if (other[unit] < 0) continue;
      const int64_t from = (kBack ? first + unit : other[unit]) * all.half + at % all.half;
      angles[at] = all.cos_KF[from] * part.scale;
      angles[numbers + at] = all.sin_KF[from] * part.scale;
    }
    __syncthreads();
  }
  const int unit_words = part.heads * words;
  for (int at = threadIdx.x; at < units * unit_words; at += kRotateThreads) {
    const int unit = at / unit_words, head = at % unit_words / words, word = at % words;
    const bool there = other[unit] >= 0;
    const int64_t token = kBack ? first + unit : other[unit], place = kBack ? other[unit] : first + unit;
    const int64_t b = place / part.row_places, n = place % part.row_places;
    Word* x = reinterpret_cast<Word*>(part.x_KHE + token * part.x_stride + int64_t{head} * all.half * 2) + word;
    Word* row = reinterpret_cast<Word*>(part.rows + b * part.b_stride + head / part.times * part.g_stride +
                                        (head % part.times * int64_t{part.row_places} + n) * part.n_stride) +
                word;
    Word one{}, two{};
    if (there) {
      const Word* from = kBack ? row : x;
      one = from[0], two = from[words];
      if (part.turned) {
        const float* cos = angles + unit * all.half + word * kCount;
        turn_words<T, kBytes>(one, two, cos, cos + numbers, kBack ? -1.f : 1.f);
      }
    } else if (!kBack && part.into_PE != nullptr) {
      const int64_t p = (b * part.heads + head) * part.row_places + n;
      const Word* from = reinterpret_cast<const Word*>(part.into_PE + p * part.into_stride) + word;
      one = from[0], two = from[words];
    }
    Word* to = kBack ? x : row;
    to[0] = one, to[words] = two;
  }
}

}  // namespace cascade
