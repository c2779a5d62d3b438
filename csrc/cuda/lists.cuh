// What kernels over lists of tensors share: element types that differ within a list, the tensor that a thread block
// works on, and four elements as one word. No torch here.
#pragma once

#include "numeric.cuh"

namespace cascade {

enum ElementKind : uint8_t { kNoElements, kFloat32Elements, kFloat16Elements, kBFloat16Elements };

// Calls run.template operator()<T>() with the element type of `kind`.
template <class Run>
__device__ inline void for_kind(uint8_t kind, Run run) {
  if (kind == kFloat32Elements) return run.template operator()<Float32>();
  if (kind == kFloat16Elements) return run.template operator()<Float16>();
  run.template operator()<BFloat16>();
}

// Of `count` tensors, which begin at the thread blocks `first`, the last that begins at this one or before.
__device__ inline int tensor_of_block(const int32_t* first, int count) {
  int which = 0;
  for (int end = count; end - which > 1;) {
    const int middle = (which + end) / 2;
    (first[middle] <= static_cast<int>(blockIdx.x) ? which : end) = middle;
  }
  return which;
}

// --- four elements, which a lane has side by side, in one word; those past `left` are 0 ------------------------------

template <class Bits>
struct Four;

template <>
struct Four<uint32_t> {
  using Word = uint4;
  static __device__ uint32_t get(const Word& word, int i) {
    return i == 0 ? word.x : i == 1 ? word.y : i == 2 ? word.z : word.w;
  }
  static __device__ Word pack(const uint32_t (&x)[4]) { return make_uint4(x[0], x[1], x[2], x[3]); }
};

template <>
struct Four<uint16_t> {
  using Word = uint2;
  static __device__ uint16_t get(const Word& word, int i) { return (i < 2 ? word.x : word.y) >> i % 2 * 16; }
  static __device__ Word pack(const uint32_t (&x)[4]) { return make_uint2(x[0] | x[1] << 16, x[2] | x[3] << 16); }
};

template <>
struct Four<uint8_t> {
  using Word = uint32_t;
  static __device__ uint8_t get(Word word, int i) { return word >> 8 * i; }
  static __device__ Word pack(const uint32_t (&x)[4]) { return x[0] | x[1] << 8 | x[2] << 16 | x[3] << 24; }
};

// kWhole: there are four, and they start on a word.
template <bool kWhole, class Bits>
__device__ inline typename Four<Bits>::Word load_four(const Bits* from, int left) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const typename Four<Bits>::Word*>(from);
  } else {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < left ? from[i] : 0u;
    return Four<Bits>::pack(x);
  }
}

template <bool kWhole, class Bits>
__device__ inline void store_four(Bits* to, int left, const uint32_t (&x)[4]) {
  if constexpr (kWhole) {
    // One store, as nothing reads it again soon; a plain one became four in places.
    __stcs(reinterpret_cast<typename Four<Bits>::Word*>(to), Four<Bits>::pack(x));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) to[i] = static_cast<Bits>(x[i]);
    }
  }
}

}  // namespace cascade
