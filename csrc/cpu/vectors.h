// What bodies do with the vectors of an instruction set (targets.h): load, convert, round, store, reduce. All results
// are written through references: a vector returned by value would tie the function to one instruction set's calling
// convention.
#pragma once

#include "targets.h"

#include <cmath>
#include <cstring>

namespace cascade_fast {
namespace {  // as in targets.h

// --- one vector, in the order of memory ------------------------------------------------------------------------------

// Unsigned integers as 32 bits. GCC makes one instruction of such a loop, and dozens of __builtin_convertvector.
template <class V, class T>
CASCADE_INLINE void widen(const T* from, typename V::Ints& to) {
  alignas(64) int32_t wide[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) wide[i] = from[i];
  std::memcpy(&to, wide, sizeof(to));
}

// From a float16 in the upper half of a word: its exponent and mantissa move to a float32's place (the arithmetic
// shift keeps the sign), 2^112 is the difference of the exponents' biases and normalises subnormals too, and
// exponent 31, which means inf or NaN, becomes 255.
template <class V>
CASCADE_INLINE void from_half(const typename V::Ints& upper, typename V::Floats& x) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const Ints moved = (upper >> 3) & static_cast<int32_t>(0x8fffe000u);
  const Floats scaled = (Floats)moved * 0x1p112f;
  const Ints special = (moved & 0x0f800000) == 0x0f800000;
  x = (Floats)((Ints)scaled | (special & 0x7f800000));
}

template <class V>
CASCADE_INLINE void load(const float* p, typename V::Floats& x) {
  std::memcpy(&x, p, sizeof(x));
}

template <class V>
CASCADE_INLINE void load(const BFloat16* p, typename V::Floats& x) {  // a bfloat16 is the upper half of a float32
  typename V::Ints words;
  widen<V>(reinterpret_cast<const uint16_t*>(p), words);
  x = (typename V::Floats)(words << 16);
}

template <class V>
CASCADE_INLINE void load(const Half* p, typename V::Floats& x) {
  typename V::Ints words;
  widen<V>(reinterpret_cast<const uint16_t*>(p), words);
  from_half<V>(words << 16, x);
}

template <class V>
CASCADE_INLINE void store(float* p, const typename V::Floats& x) {
  std::memcpy(p, &x, sizeof(x));
}

// --- two vectors at once ---------------------------------------------------------------------------------------------

// The next V::kStep values. 16-bit values are read as 32-bit words and split into lower and upper halves, so even and
// odd columns part: the order within a row is the same for all arrays of one dtype, which is all that sums of products
// ask for.
template <class V>
CASCADE_INLINE void load_pair(const float* p, typename V::Floats& x, typename V::Floats& y) {
  load<V>(p, x);
  load<V>(p + V::kLanes, y);
}

template <class V>
CASCADE_INLINE void load_pair(const BFloat16* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::Bits words;
  std::memcpy(&words, p, sizeof(words));
  x = (typename V::Floats)(words << 16);
  y = (typename V::Floats)(words & 0xffff0000u);
}

template <class V>
CASCADE_INLINE void load_pair(const Half* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::Ints words;
  std::memcpy(&words, p, sizeof(words));
  const auto lower = (typename V::Ints)((typename V::Bits)words << 16);
  from_half<V>(lower, x);
  from_half<V>(words, y);
}

// The reverse of load_pair: each value rounded to nearest, ties to even. A NaN stays one.
template <class V>
CASCADE_INLINE void store_pair(float* p, const typename V::Floats& x, const typename V::Floats& y) {
  store<V>(p, x);
  store<V>(p + V::kLanes, y);
}

template <class V>  // the rounded value in the upper half of a word; the lower half holds what was cut off
CASCADE_INLINE void round_to_bfloat16(const typename V::Floats& x, typename V::Bits& upper) {
  const auto bits = (typename V::Bits)x;
  const auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto nan = (typename V::Bits)(x != x);
  upper = (nan & (bits | 0x400000u)) | (~nan & rounded);
}

template <class V>
CASCADE_INLINE void store_pair(BFloat16* p, const typename V::Floats& x, const typename V::Floats& y) {
  typename V::Bits even, odd;
  round_to_bfloat16<V>(x, even);
  round_to_bfloat16<V>(y, odd);
  const typename V::Bits words = (even >> 16) | (odd & 0xffff0000u);
  std::memcpy(static_cast<void*>(p), &words, sizeof(words));
}

// The float16 in the lower half of a word. Below 2^-14, where a float16 is subnormal, adding 0.5 lets the addition
// round at the right bit; from 2^16 on it is infinite.
template <class V>
CASCADE_INLINE void round_to_half(const typename V::Floats& x, typename V::Bits& lower) {
  using Bits = typename V::Bits;
  const auto bits = (Bits)x;
  const Bits size = bits & 0x7fffffffu;
  const Bits normal = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
  const Bits subnormal = (Bits)((typename V::Floats)size + 0.5f) - 0x3f000000u;
  const auto is_small = (Bits)(size < 0x38800000u), is_huge = (Bits)(size >= 0x47800000u);
  const Bits special = 0x7c00u | ((Bits)(size > 0x7f800000u) & 0x200u);
  lower = (is_small & subnormal) | (is_huge & special) | (~(is_small | is_huge) & normal) | ((bits >> 16) & 0x8000u);
}

template <class V>
CASCADE_INLINE void store_pair(Half* p, const typename V::Floats& x, const typename V::Floats& y) {
  typename V::Bits even, odd;
  round_to_half<V>(x, even);
  round_to_half<V>(y, odd);
  const typename V::Bits words = even | (odd << 16);
  std::memcpy(static_cast<void*>(p), &words, sizeof(words));
}

// --- reductions ------------------------------------------------------------------------------------------------------

template <class V>
CASCADE_INLINE float sum(const typename V::Floats& v) {
  float lane[V::kLanes];
  std::memcpy(lane, &v, sizeof(lane));
  for (int width = V::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// A NaN is passed over, unless it is the first. Not through memory, as sum: adamw8bit with float16 gradients was then
// 13 % slower on AVX2 (GCC 12).
template <class V>
CASCADE_INLINE float max(const typename V::Floats& v) {
  float most = v[0];
  for (int i = 1; i < V::kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace
}  // namespace cascade_fast
