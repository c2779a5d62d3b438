// e^x of a vector.
#pragma once

#include "vectors.h"

namespace cascade_fast {
namespace {  // as in targets.h

constexpr float kLeast = -87.0f;  // e to this is the smallest normal float32, about; below counts as 0

// e^x for x <= 0 (Cephes' reduction and polynomial, 2 ulp). 0 below kLeast, NaN for NaN.
template <class V>
CASCADE_INLINE void exp_of_negative(const typename V::Floats& x, typename V::Floats& result) {
  using Floats = typename V::Floats;
  using Bits = typename V::Bits;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the lowest bits
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Bits power = ((Bits)shifted + 127u) << 23;  // 2^n
  const auto keep = (Bits)(x < kLeast);
  result = (Floats)(~keep & (Bits)(p * (Floats)power));
}

}  // namespace
}  // namespace cascade_fast
