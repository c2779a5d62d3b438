// Numbers of every dtype as float32 and back, one by one: for loops that the compiler vectorises itself.
#pragma once

#include "targets.h"

#include <cstring>

namespace cascade_fast {
namespace {  // as in targets.h

CASCADE_INLINE float widen(float x) { return x; }
CASCADE_INLINE float widen(Half x) { return static_cast<float>(x); }
CASCADE_INLINE float widen(BFloat16 x) {
  uint16_t half;
  std::memcpy(&half, static_cast<const void*>(&x), sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

CASCADE_INLINE void narrow(float x, float* to) { *to = x; }
CASCADE_INLINE void narrow(float x, Half* to) { *to = static_cast<Half>(x); }
CASCADE_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto half = static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
  std::memcpy(static_cast<void*>(to), &half, sizeof(half));
}

}  // namespace
}  // namespace cascade_fast
