// adamw_: one AdamW step over a list of tensors in float32, from gradients of any float dtype, with copies of the
// parameters in 16 bit written in the same pass. What torch's fused AdamW computes.
//
// Every element of parameters, moments and gradients is read once and written once; nothing is kept in memory of the
// kernel's own. Tensors of a list may differ in the dtypes of their gradients and copies.
#pragma once

#include "lists.cuh"

namespace cascade {

constexpr int kAdamWThreads = 256;
constexpr int64_t kAdamWChunk = 8192;  // elements of a thread block
// Tensors of one launch: its arguments may be 4,096 bytes, and 32,764 from CUDA 12.1 on.
constexpr int kFewTensors = 64, kManyTensors = 512;
constexpr int kMostCounters = 500;

template <int kMost>
struct AdamWList {
  float* param[kMost];
  const void* grad[kMost];
  float* moment1[kMost];
  float* moment2[kMost];
  void* copy[kMost];  // not read where copy_kind is kNoElements
  const float* step[kMost];
  int64_t n[kMost];
  int32_t first[kMost];  // thread block of the launch that begins the tensor
  uint8_t grad_kind[kMost], copy_kind[kMost];
};

struct AdamWSettings {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float log_beta1, log_beta2;
  float lr, weight_decay, eps;
  const float *lr_now, *grad_scale, *found_inf;  // may be null; lr_now takes the place of lr
};

struct StepCounters {
  float* step[kMostCounters];
};

struct AdamWRates {  // of one tensor's step
  float beta1, rest1, beta2, rest2, root_correction, eps, step_size, keep, unscale;
};

__device__ inline AdamWRates adamw_rates(const AdamWSettings& settings, float step) {
  const float lr = settings.lr_now != nullptr ? *settings.lr_now : settings.lr;
  // 1 - beta^step, exact to a few last bits where beta^step is close to 1, too.
  const float left1 = -expm1f(step * settings.log_beta1), left2 = -expm1f(step * settings.log_beta2);
  const float unscale = settings.grad_scale != nullptr ? 1.f / *settings.grad_scale : 1.f;
  const float keep = fmaf(-lr, settings.weight_decay, 1.f);
  return {settings.beta1, settings.rest1, settings.beta2, settings.rest2, 1.f / sqrtf(left2),
          settings.eps,   -lr / left1,    keep,           unscale};
}

template <class T>
struct AdamWArrays {
  uint32_t* param;
  const typename T::Bits* grad;
  uint32_t *moment1, *moment2;
  uint16_t* copy;
  uint8_t copy_kind;
};

// The four elements from `at`, or the `left` that there are.
template <bool kWhole, class T>
__device__ inline void adamw_four(const AdamWRates& rates, const AdamWArrays<T>& arrays, int64_t at, int left) {
  const auto param = load_four<kWhole>(arrays.param + at, left);
  const auto grad = load_four<kWhole>(arrays.grad + at, left);
  const auto first = load_four<kWhole>(arrays.moment1 + at, left);
  const auto second = load_four<kWhole>(arrays.moment2 + at, left);
  uint32_t stepped[4], bits1[4], bits2[4], copied[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float g = T::load(Four<typename T::Bits>::get(grad, i)) * rates.unscale;
    const float m = fmaf(__uint_as_float(Four<uint32_t>::get(first, i)), rates.beta1, rates.rest1 * g);
    const float v = fmaf(__uint_as_float(Four<uint32_t>::get(second, i)), rates.beta2, rates.rest2 * g * g);
    const float root = fmaf(sqrtf(v), rates.root_correction, rates.eps);
    const float p = __uint_as_float(Four<uint32_t>::get(param, i)) * rates.keep + rates.step_size * m / root;
    stepped[i] = __float_as_uint(p);
    bits1[i] = __float_as_uint(m);
    bits2[i] = __float_as_uint(v);
    copied[i] = arrays.copy_kind == kFloat16Elements ? Float16::store(p) : BFloat16::store(p);
  }
  store_four<kWhole>(arrays.param + at, left, stepped);
  store_four<kWhole>(arrays.moment1 + at, left, bits1);
  store_four<kWhole>(arrays.moment2 + at, left, bits2);
  if (arrays.copy_kind != kNoElements) store_four<kWhole>(arrays.copy + at, left, copied);
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// Counts a step of every tensor; before adamw_kernel, whose blocks all read the number. One thread block.
__global__ void __launch_bounds__(512)
    adamw_count_kernel(const __grid_constant__ StepCounters counters, const int count, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0.f) return;
  if (threadIdx.x < count) *counters.step[threadIdx.x] += 1.f;
}

// A thread block takes kAdamWChunk elements of one tensor.
template <int kMost>
__global__ void __launch_bounds__(kAdamWThreads)
    adamw_kernel(const __grid_constant__ AdamWList<kMost> list, const int count, const AdamWSettings settings) {
  if (settings.found_inf != nullptr && *settings.found_inf != 0.f) return;
  const int which = tensor_of_block(list.first, count);
  const AdamWRates rates = adamw_rates(settings, *list.step[which]);
  for_kind(list.grad_kind[which], [&]<class T>() {
    const AdamWArrays<T> arrays{
        reinterpret_cast<uint32_t*>(list.param[which]),   static_cast<const typename T::Bits*>(list.grad[which]),
        reinterpret_cast<uint32_t*>(list.moment1[which]), reinterpret_cast<uint32_t*>(list.moment2[which]),
        static_cast<uint16_t*>(list.copy[which]),         list.copy_kind[which]};
    const auto starts = [](const auto* pointer) {  // on a word of four; a null pointer does
      return reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(*pointer)) == 0;
    };
    const bool aligned = starts(arrays.param) && starts(arrays.grad) && starts(arrays.moment1) &&
                         starts(arrays.moment2) && starts(arrays.copy);
    const int64_t begin = (static_cast<int64_t>(blockIdx.x) - list.first[which]) * kAdamWChunk;
    const int64_t end = min(begin + kAdamWChunk, list.n[which]);
    for (int64_t at = begin + 4 * threadIdx.x; at < end; at += 4 * kAdamWThreads) {
      if (aligned && end - at >= 4) {
        adamw_four<true, T>(rates, arrays, at, 4);
      } else {
        adamw_four<false, T>(rates, arrays, at, static_cast<int>(end - at));
      }
    }
  });
}

}  // namespace cascade
