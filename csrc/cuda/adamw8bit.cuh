// adamw8bit: one AdamW step over a list of tensors in one launch, moments as 8-bit codes with a scale for each 256
// values. Codes, scales and rounding are those of the CPU's body (csrc/cpu/adamw8bit.cpp).
//
// A warp takes a block of 256 values, eight a lane: moments stay in registers until the warp has agreed on their scale.
// Parameters, gradients and state are read once and written once, and nothing is kept in memory of the kernel's own.
#pragma once

#include "../dynamic_map.h"
#include "numeric.cuh"

#include <type_traits>

namespace cascade {

using cascade_fast::Line;
using cascade_fast::Map;

constexpr int kStepBlock = 256;      // values that share a scale
constexpr int kStepThreads = 256;    // eight warps
constexpr int kStepBlocksAWarp = 4;
constexpr int64_t kStepChunk = kStepThreads / kWarp * kStepBlocksAWarp * kStepBlock;  // values of a thread block
constexpr int kMaxStepTensors = 64;  // of one launch, whose arguments may be 4,096 bytes

struct StepList {
  float* param[kMaxStepTensors];
  const void* grad[kMaxStepTensors];
  void* state1[kMaxStepTensors];  // uint8, or float32 where there are no scales
  void* state2[kMaxStepTensors];
  float* absmax1[kMaxStepTensors];  // null for float32 moments
  float* absmax2[kMaxStepTensors];
  int64_t n[kMaxStepTensors];
  int32_t first[kMaxStepTensors];  // thread block of the launch that begins the tensor
};

struct StepSettings {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float log_beta1, log_beta2;
  float lr, keep, eps;  // keep = 1 - lr * weight_decay
  float step;           // its number, from 1, as the host counts
  const float *grad_scale, *found_inf, *skipped;  // may be null
};

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }  // passes over NaN
};

__device__ constexpr Map kMaps[2] = {cascade_fast::kSigned, cascade_fast::kUnsigned};

__device__ inline float on_line(const Line (&table)[8], uint32_t index, float x) {
  const Line line = table[index & 7u];
  return fmaf(line.slope, x, line.offset);
}

template <bool kSigned>
__device__ inline float decode(const Map& map, uint32_t code) {
  // The map's last value, 1, is where the line of the last decade ends, half a step after the value before it.
  const float end = map.position_scale * (map.last - 0.5f);
  const float position = kSigned ? static_cast<float>(code) * 4.f - 508.f : static_cast<float>(code) + 1.f;
  const float distance = fminf(fabsf(position), end);
  const float value = on_line(map.value, __float_as_uint(distance) >> 23, distance);
  return kSigned ? copysignf(value, position) : value;
}

// The code nearest to x / absmax after that has been rounded to the grid. NaN, which is also 0 / 0, gets code 0.
template <bool kSigned>
__device__ inline uint32_t encode(const Map& map, float x, float inverse) {
  const float scaled = x * inverse;
  if (scaled != scaled) return 0;
  // Points are numbered 2, 6, 10, ... 131070 and likewise below 0.
  const int floor = __float2int_rz(fmaf(fmaf(x, inverse, 1.f), 32767.5f, 0.5f));
  const float point = static_cast<float>(floor) * 4.f - 131070.f;
  const float distance = fminf(fabsf(point), 131070.f);
  const uint32_t power = __float_as_uint(distance) >> 24;
  float position = on_line(map.position[0], power, distance);
  position = fminf(position, on_line(map.position[1], power, distance));
  position = fminf(position, on_line(map.position[2], power, distance));
  if (point > map.top) position = map.last;
  if constexpr (kSigned) return 127 + static_cast<int>(copysignf(position, point));
  return static_cast<int>(fmaxf(position, 1.f)) - 1;
}

__device__ inline float inverse_of(float absmax) {
  // Finite for a subnormal scale; NaN for 0, so that every code of such a block becomes 0.
  return absmax == 0.f ? __uint_as_float(0x7fc00000u) : fminf(1.f / absmax, 3.402823466e38f);
}

// --- four elements, which a lane has side by side; those past `left` are 0 -------------------------------------------

template <class Bits>
struct FourOf;
template <>
struct FourOf<uint32_t> { using type = uint4; };
template <>
struct FourOf<uint16_t> { using type = uint2; };
template <>
struct FourOf<uint8_t> { using type = uint32_t; };

template <class Bits>
__device__ inline void load_four(const Bits* from, int left, bool aligned, uint32_t (&x)[4]) {
  if (aligned && left >= 4) {
    const auto word = *reinterpret_cast<const typename FourOf<Bits>::type*>(from);
    if constexpr (sizeof(Bits) == 4) x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
    if constexpr (sizeof(Bits) == 2) {
      x[0] = word.x & 0xffffu, x[1] = word.x >> 16, x[2] = word.y & 0xffffu, x[3] = word.y >> 16;
    }
    if constexpr (sizeof(Bits) == 1) {
      x[0] = word & 0xffu, x[1] = word >> 8 & 0xffu, x[2] = word >> 16 & 0xffu, x[3] = word >> 24;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < left ? from[i] : 0u;
  }
}

template <class Bits>
__device__ inline void store_four(Bits* to, int left, bool aligned, const uint32_t (&x)[4]) {
  if (aligned && left >= 4) {
    if constexpr (sizeof(Bits) == 4) *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
    if constexpr (sizeof(Bits) == 1) {
      *reinterpret_cast<uint32_t*>(to) = x[0] | x[1] << 8 | x[2] << 16 | x[3] << 24;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) to[i] = static_cast<Bits>(x[i]);
    }
  }
}

// --- a block of 256 values -------------------------------------------------------------------------------------------

struct StepRates {  // of one step of one launch
  float beta1, rest1, beta2, rest2, root_correction, eps, step_size, keep, unscale;
};

__device__ inline StepRates rates_of(const StepSettings& settings) {
  const float step = settings.step - (settings.skipped != nullptr ? *settings.skipped : 0.f);
  // 1 - beta^step, exact to a few last bits where beta^step is close to 1, too.
  const float left1 = -expm1f(step * settings.log_beta1), left2 = -expm1f(step * settings.log_beta2);
  const float unscale = settings.grad_scale != nullptr ? 1.f / *settings.grad_scale : 1.f;
  return {settings.beta1, settings.rest1,       settings.beta2, settings.rest2, 1.f / sqrtf(left2),
          settings.eps,   -settings.lr / left1, settings.keep,  unscale};
}

// What a lane holds of a block: elements [4 lane, 4 lane + 4) of either half, so that a warp's words lie side by side.
template <class T, bool kCoded>
__device__ inline void step_block(const StepRates& rates, const Map& map1, const Map& map2, float* param,
                                  const typename T::Bits* grad, void* state1, void* state2, float* absmax1,
                                  float* absmax2, int64_t at, int64_t n, bool aligned) {
  using State = std::conditional_t<kCoded, uint8_t, uint32_t>;
  auto* first = static_cast<State*>(state1) + at;
  auto* second = static_cast<State*>(state2) + at;
  const int lane = threadIdx.x % kWarp;
  const int size = static_cast<int>(min(n - at, static_cast<int64_t>(kStepBlock)));
  uint32_t p[2][4], g[2][4], code1[2][4], code2[2][4];
  float m[2][4], v[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = half * (kStepBlock / 2) + 4 * lane;
    load_four(reinterpret_cast<const uint32_t*>(param + at) + i, size - i, aligned, p[half]);
    load_four(grad + at + i, size - i, aligned, g[half]);
    load_four(first + i, size - i, aligned, code1[half]);
    load_four(second + i, size - i, aligned, code2[half]);
  }
  const float scale1 = kCoded ? absmax1[at / kStepBlock] : 1.f, scale2 = kCoded ? absmax2[at / kStepBlock] : 1.f;
  float most1 = 0.f, most2 = 0.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float old1 = kCoded ? decode<true>(map1, code1[half][i]) : __uint_as_float(code1[half][i]);
      const float old2 = kCoded ? decode<false>(map2, code2[half][i]) : __uint_as_float(code2[half][i]);
      const float gradient = T::load(static_cast<typename T::Bits>(g[half][i])) * rates.unscale;
      const bool inside = half * (kStepBlock / 2) + 4 * lane + i < size;
      m[half][i] = inside ? fmaf(old1, scale1 * rates.beta1, rates.rest1 * gradient) : 0.f;
      v[half][i] = inside ? fmaf(old2, scale2 * rates.beta2, rates.rest2 * gradient * gradient) : 0.f;
      const float root = fmaf(sqrtf(v[half][i]), rates.root_correction, rates.eps);
      const float kept = __uint_as_float(p[half][i]) * rates.keep;
      p[half][i] = __float_as_uint(kept + rates.step_size * m[half][i] / root);
      most1 = fmaxf(most1, fabsf(m[half][i]));
      most2 = fmaxf(most2, v[half][i]);
    }
  }
  if constexpr (kCoded) {
    most1 = warp_reduce<Max>(most1);
    most2 = warp_reduce<Max>(most2);
    if (lane == 0) {
      absmax1[at / kStepBlock] = most1;
      absmax2[at / kStepBlock] = most2;
    }
  }
  const float inverse1 = inverse_of(most1), inverse2 = inverse_of(most2);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int start = half * (kStepBlock / 2) + 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      code1[half][i] = kCoded ? encode<true>(map1, m[half][i], inverse1) : __float_as_uint(m[half][i]);
      code2[half][i] = kCoded ? encode<false>(map2, v[half][i], inverse2) : __float_as_uint(v[half][i]);
    }
    store_four(reinterpret_cast<uint32_t*>(param + at) + start, size - start, aligned, p[half]);
    store_four(first + start, size - start, aligned, code1[half]);
    store_four(second + start, size - start, aligned, code2[half]);
  }
}

// --- the kernel: a thread block takes kStepChunk values of one tensor ------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kStepThreads, 4)
    adamw8bit_kernel(const __grid_constant__ StepList list, const int count, const StepSettings settings) {
  if (settings.found_inf != nullptr && *settings.found_inf != 0.f) return;
  constexpr int kWords = sizeof(kMaps) / sizeof(float);
  __shared__ float words[kWords];  // in shared memory, as lanes look up different lines
  for (int i = threadIdx.x; i < kWords; i += kStepThreads) words[i] = reinterpret_cast<const float*>(kMaps)[i];
  const auto* maps = reinterpret_cast<const Map*>(words);
  __syncthreads();
  int which = 0;  // the last tensor that begins at this thread block or before
  for (int end = count; end - which > 1;) {
    const int middle = (which + end) / 2;
    (list.first[middle] <= static_cast<int>(blockIdx.x) ? which : end) = middle;
  }
  const StepRates rates = rates_of(settings);
  float* param = list.param[which];
  const auto* grad = static_cast<const typename T::Bits*>(list.grad[which]);
  void *state1 = list.state1[which], *state2 = list.state2[which];
  float *absmax1 = list.absmax1[which], *absmax2 = list.absmax2[which];
  const int64_t n = list.n[which];
  const bool coded = absmax1 != nullptr;
  const auto bits = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool aligned = bits(param) % 16 == 0 && bits(grad) % (4 * sizeof(typename T::Bits)) == 0 &&
                       (bits(state1) | bits(state2)) % (coded ? 4 : 16) == 0;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - list.first[which]) * kStepChunk;
#pragma unroll 1
  for (int i = threadIdx.x / kWarp; i < kStepChunk / kStepBlock; i += kStepThreads / kWarp) {
    const int64_t at = start + i * kStepBlock;
    if (at >= n) break;
    if (coded) {
      step_block<T, true>(rates, maps[0], maps[1], param, grad, state1, state2, absmax1, absmax2, at, n, aligned);
    } else {
      step_block<T, false>(rates, maps[0], maps[1], param, grad, state1, state2, absmax1, absmax2, at, n, aligned);
    }
  }
}

}  // namespace cascade
