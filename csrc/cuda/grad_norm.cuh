// grad_norm: the norm of a list of gradients and what follows from it for the step, in two kernels: a sum of squares
// for each thread block, and one block that adds them up. Sums are made in one fixed order.
#pragma once

#include "lists.cuh"

namespace cascade {

constexpr int kGradNormThreads = 256;
constexpr int64_t kGradNormChunk = 32768;  // elements of a thread block
constexpr int kMostGrads = 190;            // of one launch, whose arguments may be 4,096 bytes

struct GradList {
  const void* grad[kMostGrads];
  int64_t n[kMostGrads];
  int32_t first[kMostGrads];  // thread block of the launch that begins the tensor
  uint8_t kind[kMostGrads];
};

// Of all threads of a block, in thread 0.
__device__ inline float block_sum(float x) {
  __shared__ float sums[kGradNormThreads / kWarp];
  x = warp_reduce<Sum>(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kGradNormThreads / kWarp; ++warp) x += sums[warp];
  }
  return x;
}

template <class T, int kBytes>
__device__ inline float sum_of_squares(const typename T::Bits* grad, int64_t n) {
  using Word = typename WordOf<kBytes>::type;
  constexpr int kCount = Elements<T, kBytes>::kCount;
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < n / kCount; i += kGradNormThreads) {
    const Elements<T, kBytes> elements(reinterpret_cast<const Word*>(grad)[i]);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = fmaf(elements.value[j], elements.value[j], sum);
  }
  const int64_t rest = n / kCount * kCount + threadIdx.x;
  if (rest < n) {
    const float last = T::load(grad[rest]);
    sum = fmaf(last, last, sum);
  }
  return sum;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kGradNormThreads)
    grad_norm_parts_kernel(const __grid_constant__ GradList list, const int count, float* parts) {
  const int which = tensor_of_block(list.first, count);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - list.first[which]) * kGradNormChunk;
  const int64_t n = min(kGradNormChunk, list.n[which] - begin);
  float sum = 0.f;
  for_kind(list.kind[which], [&]<class T>() {
    const auto* grad = static_cast<const typename T::Bits*>(list.grad[which]) + begin;
    const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
    sum = aligned ? sum_of_squares<T, 16>(grad, n) : sum_of_squares<T, sizeof(*grad)>(grad, n);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One thread block. `scale` may be null: 1. `clip` 0: no limit.
__global__ void __launch_bounds__(kGradNormThreads)
    grad_norm_kernel(const float* parts, const int64_t count, const float* scale, const float clip, float* norm,
                     float* factor, float* found_inf) {
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < count; i += kGradNormThreads) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const float root = sqrtf(sum), scaled_by = scale != nullptr ? *scale : 1.f;
  const float limited = fmaf(scaled_by, 1e-6f, root) / clip;
  *norm = root;
  *factor = clip > 0.f && !(limited <= scaled_by) ? limited : scaled_by;  // NaN stays NaN
  *found_inf = root - root == 0.f ? 0.f : 1.f;
}

}  // namespace cascade
