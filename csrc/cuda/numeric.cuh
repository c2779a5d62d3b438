// Element types, vector loads and small warp helpers shared by the kernels. No torch here: kernels compile alone.
//
// Rows are moved in words of kBytes: 16 where addresses allow it, else one element. Elements are loaded as raw bits and
// turned into float32, so bfloat16 needs no bfloat16 instruction (sm_75 has none).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace cascade {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Float32 {
  using Bits = uint32_t;
  static __device__ float load(Bits bits) { return __uint_as_float(bits); }
  static __device__ Bits store(float x) { return __float_as_uint(x); }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ float load(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ Bits store(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ float load(Bits bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  static __device__ Bits store(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7fc0;  // rounding could carry a NaN into infinity
    return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // nearest, ties to even
  }
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> { using type = uint4; };
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<2> { using type = uint16_t; };

// The elements of one word as float32. Taken apart with shifts: through memory (memcpy, a union) the compiler is free
// to turn the load of a word into one load an element, and does.
template <class T, int kBytes>
struct Elements {
  using Bits = typename T::Bits;
  using Word = typename WordOf<kBytes>::type;
  static constexpr int kCount = kBytes / sizeof(Bits);
  float value[kCount];

  Elements() = default;

  __device__ explicit Elements(Word word) {
    if constexpr (kCount == 1) {
      value[0] = T::load(word);
    } else {
      uint32_t part[kBytes / 4] = {word.x, word.y};
      if constexpr (kBytes == 16) part[2] = word.z, part[3] = word.w;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if constexpr (sizeof(Bits) == 4) value[i] = T::load(part[i]);
        if constexpr (sizeof(Bits) == 2) value[i] = T::load(static_cast<Bits>(part[i / 2] >> (i % 2 * 16)));
      }
    }
  }

  __device__ Word word() const {
    if constexpr (kCount == 1) {
      return T::store(value[0]);
    } else {
      uint32_t part[kBytes / 4] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if constexpr (sizeof(Bits) == 4) part[i] = T::store(value[i]);
        if constexpr (sizeof(Bits) == 2) part[i / 2] |= static_cast<uint32_t>(T::store(value[i])) << (i % 2 * 16);
      }
      if constexpr (kBytes == 8) return make_uint2(part[0], part[1]);
      if constexpr (kBytes == 16) return make_uint4(part[0], part[1], part[2], part[3]);
    }
  }
};

struct Sum {
  template <class X>
  __device__ X operator()(X x, X y) const { return x + y; }
};

struct Min {
  __device__ uint32_t operator()(uint32_t x, uint32_t y) const { return min(x, y); }
};

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }  // passes over NaN
};

// In every lane, in one fixed order.
template <class Op, class X>
__device__ inline X warp_reduce(X x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = Op()(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

}  // namespace cascade
