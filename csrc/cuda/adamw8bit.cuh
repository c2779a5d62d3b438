// adamw8bit: one AdamW step over a list of tensors in one launch, moments as 8-bit codes with a scale for each 256
// values. Codes, scales and rounding are those of the CPU's body (csrc/cpu/adamw8bit.cpp).
//
// A warp takes a block of 256 values, eight a lane: moments stay in registers until the warp has agreed on their scale.
// Parameters, gradients and state are read once and written once, and nothing is kept in memory of the kernel's own.
#pragma once

#include "../dynamic_map.h"
#include "lists.cuh"

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

// One tensor, or what begins in it at some element.
template <class T, class State>
struct StepArrays {
  uint32_t* param;
  const typename T::Bits* grad;
  State *state1, *state2;
};

// `size` values of which a lane has [4 lane, 4 lane + 4) of either half, so that a warp's words lie side by side.
template <bool kWhole, class T, class State>
__device__ inline void step_block(const StepRates& rates, const Map* maps, const StepArrays<T, State>& block,
                                  float* absmax1, float* absmax2, int size) {
  constexpr bool kCoded = sizeof(State) == 1;
  const int lane = threadIdx.x % kWarp;
  typename Four<uint32_t>::Word param[2];
  typename Four<typename T::Bits>::Word grad[2];
  typename Four<State>::Word first[2], second[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = half * (kStepBlock / 2) + 4 * lane;
    param[half] = load_four<kWhole>(block.param + at, size - at);
    grad[half] = load_four<kWhole>(block.grad + at, size - at);
    first[half] = load_four<kWhole>(block.state1 + at, size - at);
    second[half] = load_four<kWhole>(block.state2 + at, size - at);
  }
  const float keep1 = kCoded ? *absmax1 * rates.beta1 : rates.beta1;
  const float keep2 = kCoded ? *absmax2 * rates.beta2 : rates.beta2;
  float m[2][4], v[2][4], most1 = 0.f, most2 = 0.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = half * (kStepBlock / 2) + 4 * lane;
    uint32_t stepped[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto bits1 = Four<State>::get(first[half], i), bits2 = Four<State>::get(second[half], i);
      const float old1 = kCoded ? decode<true>(maps[0], bits1) : __uint_as_float(bits1);
      const float old2 = kCoded ? decode<false>(maps[1], bits2) : __uint_as_float(bits2);
      const float g = T::load(Four<typename T::Bits>::get(grad[half], i)) * rates.unscale;
      const bool inside = kWhole || at + i < size;  // else a code of 0, which is not the value 0
      m[half][i] = inside ? fmaf(old1, keep1, rates.rest1 * g) : 0.f;
      v[half][i] = inside ? fmaf(old2, keep2, rates.rest2 * g * g) : 0.f;
      const float root = fmaf(sqrtf(v[half][i]), rates.root_correction, rates.eps);
      const float p = __uint_as_float(Four<uint32_t>::get(param[half], i));
      stepped[i] = __float_as_uint(p * rates.keep + rates.step_size * m[half][i] / root);
      most1 = fmaxf(most1, fabsf(m[half][i]));
      most2 = fmaxf(most2, v[half][i]);
    }
    store_four<kWhole>(block.param + at, size - at, stepped);
  }
  if constexpr (kCoded) {
    most1 = warp_reduce<Max>(most1);
    most2 = warp_reduce<Max>(most2);
    if (lane == 0) {
      *absmax1 = most1;
      *absmax2 = most2;
    }
  }
  const float inverse1 = inverse_of(most1), inverse2 = inverse_of(most2);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = half * (kStepBlock / 2) + 4 * lane;
    uint32_t bits1[4], bits2[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits1[i] = kCoded ? encode<true>(maps[0], m[half][i], inverse1) : __float_as_uint(m[half][i]);
      bits2[i] = kCoded ? encode<false>(maps[1], v[half][i], inverse2) : __float_as_uint(v[half][i]);
    }
    store_four<kWhole>(block.state1 + at, size - at, bits1);
    store_four<kWhole>(block.state2 + at, size - at, bits2);
  }
}

template <class T, class State>
__device__ inline void step_chunk(const StepRates& rates, const Map* maps, const StepList& list, int which) {
  const StepArrays<T, State> all{reinterpret_cast<uint32_t*>(list.param[which]),
                                 static_cast<const typename T::Bits*>(list.grad[which]),
                                 static_cast<State*>(list.state1[which]), static_cast<State*>(list.state2[which])};
  const auto starts = [](const auto* pointer) {  // on a word of four
    return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(*pointer)) == 0;
  };
  const bool aligned = starts(all.param) && starts(all.grad) && starts(all.state1) && starts(all.state2);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) - list.first[which];
#pragma unroll 1
  for (int i = 0; i < kStepBlocksAWarp; ++i) {
    const int64_t b = (chunk * kStepBlocksAWarp + i) * (kStepThreads / kWarp) + threadIdx.x / kWarp;
    const int64_t at = b * kStepBlock, left = list.n[which] - at;
    if (left <= 0) break;
    const StepArrays<T, State> block{all.param + at, all.grad + at, all.state1 + at, all.state2 + at};
    float *absmax1 = list.absmax1[which] + b, *absmax2 = list.absmax2[which] + b;
    if (aligned && left >= kStepBlock) {
      step_block<true>(rates, maps, block, absmax1, absmax2, kStepBlock);
    } else {
      step_block<false>(rates, maps, block, absmax1, absmax2, static_cast<int>(min(left, int64_t{kStepBlock})));
    }
  }
}

// --- the kernel: a thread block takes kStepChunk values of one tensor ------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kStepThreads, 3)
    adamw8bit_kernel(const __grid_constant__ StepList list, const int count, const StepSettings settings) {
  if (settings.found_inf != nullptr && *settings.found_inf != 0.f) return;
  constexpr int kWords = sizeof(kMaps) / sizeof(float);
  __shared__ float words[kWords];  // in shared memory, as lanes look up different lines
  for (int i = threadIdx.x; i < kWords; i += kStepThreads) words[i] = reinterpret_cast<const float*>(kMaps)[i];
  const auto* maps = reinterpret_cast<const Map*>(words);
  __syncthreads();
  const int which = tensor_of_block(list.first, count);
  const StepRates rates = rates_of(settings);
  if (list.absmax1[which] != nullptr) {
    step_chunk<T, uint8_t>(rates, maps, list, which);
  } else {
    step_chunk<T, uint32_t>(rates, maps, list, which);
  }
}

}  // namespace cascade
