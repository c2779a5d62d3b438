// The compiler's portable vectors, for bodies that are compiled once for each instruction set of x86-64 (AVX-512, AVX2 and
// the SSE2 baseline), with vectors of that set's own width, and picked at run time. One body with vectors of 16 floats
// for all is shorter, but GCC 12 splits them through the stack: AVX2 then reached 0.4 to 0.6 of the memory's bandwidth.
#pragma once

#include "targets.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace cascade_fast {
namespace {  // compiled for several instruction sets in every file that includes it: nothing here may be shared

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <int Lanes>
struct Vectors {  // of one instruction set
  static constexpr int kLanes = Lanes;      // floats in a vector
  static constexpr int kStep = 2 * Lanes;   // values of a row taken at once
  // typedef, not using: GCC ignores the attribute of an alias that depends on a template parameter.
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * Lanes)));
  typedef int32_t SignedBits __attribute__((vector_size(4 * Lanes)));
  static_assert(sizeof(Floats) == 4 * Lanes && sizeof(Bits) == 4 * Lanes && sizeof(SignedBits) == 4 * Lanes);
};

// The next 2 * Lanes values as two vectors of float32, written through references: a vector returned by value would tie
// the function to one instruction set's calling convention. 16-bit values are read as 32-bit words and split into lower
// and upper halves, so even and odd columns part: the order within a row is the same for both arrays, which is all
// that sums of products ask for.
template <class V>
CASCADE_INLINE void load(const float* p, typename V::Floats& x, typename V::Floats& y) {
  std::memcpy(&x, p, sizeof(x));
  std::memcpy(&y, p + V::kLanes, sizeof(y));
}

template <class V>  // a bfloat16 is the upper half of a float32
CASCADE_INLINE void load(const BFloat16* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::Bits words;
  std::memcpy(&words, p, sizeof(words));
  x = (typename V::Floats)(words << 16);
  y = (typename V::Floats)(words & 0xffff0000u);
}

// From a float16 in the upper half of a word: its exponent and mantissa move to a float32's place (the arithmetic
// shift keeps the sign), 2^112 is the difference of the exponents' biases and normalises subnormals too, and
// exponent 31, which means inf or NaN, becomes 255.
template <class V>
CASCADE_INLINE void from_half(const typename V::SignedBits& upper, typename V::Floats& x) {
  using Floats = typename V::Floats;
  using SignedBits = typename V::SignedBits;
  const SignedBits moved = (upper >> 3) & static_cast<int32_t>(0x8fffe000u);
  const Floats scaled = (Floats)moved * 0x1p112f;
  const SignedBits special = (moved & 0x0f800000) == 0x0f800000;
  x = (Floats)((SignedBits)scaled | (special & 0x7f800000));
}

template <class V>
CASCADE_INLINE void load(const Half* p, typename V::Floats& x, typename V::Floats& y) {
  typename V::SignedBits words;
  std::memcpy(&words, p, sizeof(words));
  const auto lower = (typename V::SignedBits)((typename V::Bits)words << 16);
  from_half<V>(lower, x);
  from_half<V>(words, y);
}

// The reverse of load: each value rounded to nearest, ties to even. A NaN stays one.
template <class V>
CASCADE_INLINE void store(float* p, const typename V::Floats& x, const typename V::Floats& y) {
  std::memcpy(p, &x, sizeof(x));
  std::memcpy(p + V::kLanes, &y, sizeof(y));
}

template <class V>  // the rounded value in the upper half of a word; the lower half holds what was cut off
CASCADE_INLINE void round_to_bfloat16(const typename V::Floats& x, typename V::Bits& upper) {
  const auto bits = (typename V::Bits)x;
  const auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto nan = (typename V::Bits)(x != x);
  upper = (nan & (bits | 0x400000u)) | (~nan & rounded);
}

template <class V>
CASCADE_INLINE void store(BFloat16* p, const typename V::Floats& x, const typename V::Floats& y) {
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
CASCADE_INLINE void store(Half* p, const typename V::Floats& x, const typename V::Floats& y) {
  typename V::Bits even, odd;
  round_to_half<V>(x, even);
  round_to_half<V>(y, odd);
  const typename V::Bits words = even | (odd << 16);
  std::memcpy(static_cast<void*>(p), &words, sizeof(words));
}

template <class V>
CASCADE_INLINE float sum(const typename V::Floats& v) {
  float lane[V::kLanes];
  std::memcpy(lane, &v, sizeof(lane));
  for (int width = V::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

}  // namespace
}  // namespace cascade_fast
