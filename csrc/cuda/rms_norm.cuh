// rms_norm and add_rms_norm, and their gradients: float32 in, float32 inside, rounded once to the compute dtype.
//
// A team of warps a row holds the row in registers, so that memory is read once; teams take rows in turn and hold the
// weight, too. A row that is too long is read again, in parts. The order of every sum depends on the shape alone.
//
// Shape legend: N rows, D hidden size, P teams, each with a part of the weight's gradient.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kNormHeld = 4;                 // words of each array that a thread holds
constexpr int kNormThreads = 512;            // of a team, at most: with more there are too few registers
constexpr int kNormSharedBlock = 256;        // threads of a block that teams of one warp share
constexpr int64_t kNormBlocks = 4096;        // at most; more rows than their teams are taken in turn
constexpr int64_t kNormParts = 512;          // teams at most, where each leaves a part of the weight's gradient,
constexpr int64_t kNormRowsPerPart = 4;      // and rows that each of them has at least, if there are so many
constexpr int kNormSumThreads = 16 * kWarp;  // of the parts' sum: a warp takes every 16th part of 32 columns

// Threads of the team for rows of `words`: whole warps, as few as can hold them.
inline int norm_team(int words) {
  const int warps = (words + kNormHeld * kWarp - 1) / (kNormHeld * kWarp);
  return kWarp * (warps < 1 ? 1 : warps < kNormThreads / kWarp ? warps : kNormThreads / kWarp);
}

// The sum over a team, in all its threads, in one fixed order. A team of one warp needs no memory; a larger one is
// alone in its block. `turn` alternates, so that one barrier a sum is enough.
__device__ inline float team_sum(float x, int team, float (&shared)[2][kNormThreads / kWarp], int turn) {
  x = warp_reduce<Sum>(x);
  if (team == kWarp) return x;
  if (threadIdx.x % kWarp == 0) shared[turn][threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < team / kWarp; ++warp) total += shared[turn][warp];
  return total;
}

// kCount elements, 4 or 1: 16 bytes of float32, 8 in 16 bit, so that a thread's words are of the same elements.
template <class T, int kCount>
using NormWord = Elements<T, kCount * static_cast<int>(sizeof(typename T::Bits))>;

template <class T, int kCount>
__device__ inline NormWord<T, kCount> load_word(const typename T::Bits* row, int at) {
  return NormWord<T, kCount>(reinterpret_cast<const typename NormWord<T, kCount>::Word*>(row)[at]);
}

template <class T, int kCount>
__device__ inline void store_word(typename T::Bits* row, int at, const NormWord<T, kCount>& word) {
  reinterpret_cast<typename NormWord<T, kCount>::Word*>(row)[at] = word.word();
}

// out_ND = weight_D * s / rms(s), with s = x, or with kAdd s = x + added, which is left in sum_ND. Outputs contiguous.
template <class T, int kCount, bool kAdd>
__global__ void __launch_bounds__(kNormThreads, 1) rms_norm_kernel(
    const uint32_t* __restrict__ x_ND, int64_t x_stride, const typename T::Bits* __restrict__ added_ND,
    int64_t added_stride, const uint32_t* __restrict__ weight_D, uint32_t* sum_ND,
    typename T::Bits* __restrict__ out_ND, float* __restrict__ inv_rms_N, int64_t rows, int dim, float eps, int team) {
  using Wide = NormWord<Float32, kCount>;
  __shared__ float shared[2][kNormThreads / kWarp];
  const int words = dim / kCount, held = team * kNormHeld, lane = threadIdx.x % team;
  const bool at_once = words <= held;
  const int64_t teams = static_cast<int64_t>(gridDim.x) * (blockDim.x / team);
  Wide x[kNormHeld], weight[kNormHeld];

  const auto load_weight = [&](int begin) {
#pragma unroll
    for (int u = 0; u < kNormHeld; ++u) {
      const int at = begin + lane + u * team;
      if (at < words) weight[u] = load_word<Float32, kCount>(weight_D, at);
    }
  };
  if (at_once) load_weight(0);

  int turn = 0;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x / team) + threadIdx.x / team; row < rows;
       row += teams, turn ^= 1) {
    const uint32_t* x_D = x_ND + row * x_stride;
    const auto* added_D = added_ND + row * added_stride;
    uint32_t* sum_D = sum_ND + row * dim;
    float squares = 0.f;
    for (int begin = 0; begin < words; begin += held) {
      NormWord<T, kCount> added[kAdd ? kNormHeld : 1];
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        const int at = begin + lane + u * team;
        if (at >= words) continue;
        x[u] = load_word<Float32, kCount>(x_D, at);
        if constexpr (kAdd) added[u] = load_word<T, kCount>(added_D, at);
      }
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        const int at = begin + lane + u * team;
        if (at >= words) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if constexpr (kAdd) x[u].value[i] += added[u].value[i];
          squares = fmaf(x[u].value[i], x[u].value[i], squares);
        }
        if constexpr (kAdd) store_word<Float32, kCount>(sum_D, at, x[u]);
      }
    }
    const float inv_rms = 1.f / sqrtf(team_sum(squares, team, shared, turn) / static_cast<float>(dim) + eps);
    if (lane == 0) inv_rms_N[row] = inv_rms;
    for (int begin = 0; begin < words; begin += held) {
      if (!at_once) load_weight(begin);
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        const int at = begin + lane + u * team;
        if (at >= words) continue;
        if (!at_once) x[u] = load_word<Float32, kCount>(kAdd ? sum_D : x_D, at);
        NormWord<T, kCount> out;
#pragma unroll
        for (int i = 0; i < kCount; ++i) out.value[i] = x[u].value[i] * inv_rms * weight[u].value[i];
        store_word<T, kCount>(out_ND + row * dim, at, out);
      }
    }
  }
}

// With g = grad * weight: grad_x_ND = inv_rms * (g - x * mean(g * x) * inv_rms^2). kAdd: plus grad_sum, what else has
// come back to x, and the same in grad's dtype in grad_added_ND. kWeight: each team leaves its rows' sum of
// grad * x * inv_rms in its row of grad_weight_PD. Outputs contiguous.
template <class T, int kCount, bool kAdd, bool kWeight>
__global__ void __launch_bounds__(kNormThreads, 1) rms_norm_backward_kernel(
    const typename T::Bits* __restrict__ grad_ND, int64_t grad_stride, const uint32_t* __restrict__ x_ND,
    int64_t x_stride, const uint32_t* __restrict__ weight_D, const float* __restrict__ inv_rms_N,
    const uint32_t* __restrict__ grad_sum_ND, int64_t grad_sum_stride, uint32_t* __restrict__ grad_x_ND,
    typename T::Bits* __restrict__ grad_added_ND, uint32_t* grad_weight_PD, int64_t rows, int dim, int team) {
  using Wide = NormWord<Float32, kCount>;
  __shared__ float shared[2][kNormThreads / kWarp];
  const int words = dim / kCount, held = team * kNormHeld, lane = threadIdx.x % team;
  const bool at_once = words <= held;
  const int64_t teams = static_cast<int64_t>(gridDim.x) * (blockDim.x / team);
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x / team) + threadIdx.x / team;
  Wide x[kNormHeld], weight[kNormHeld], grad_weight[kWeight ? kNormHeld : 1];
  NormWord<T, kCount> grad[kNormHeld];

  const auto load_weight = [&](int begin) {
#pragma unroll
    for (int u = 0; u < kNormHeld; ++u) {
      const int at = begin + lane + u * team;
      if (at < words) weight[u] = load_word<Float32, kCount>(weight_D, at);
    }
  };
  if (at_once) load_weight(0);
  if constexpr (kWeight) {
#pragma unroll
    for (int u = 0; u < kNormHeld; ++u) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) grad_weight[u].value[i] = 0.f;
    }
  }

  int turn = 0;
  for (int64_t row = first; row < rows; row += teams, turn ^= 1) {
    const auto* grad_D = grad_ND + row * grad_stride;
    const uint32_t* x_D = x_ND + row * x_stride;
    const auto load = [&](int begin) {
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        const int at = begin + lane + u * team;
        if (at >= words) continue;
        grad[u] = load_word<T, kCount>(grad_D, at);
        x[u] = load_word<Float32, kCount>(x_D, at);
      }
      if (!at_once) load_weight(begin);
    };
    const float inv_rms = inv_rms_N[row];
    float products = 0.f;
    for (int begin = 0; begin < words; begin += held) {
      load(begin);
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        if (begin + lane + u * team >= words) continue;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          products = fmaf(grad[u].value[i] * weight[u].value[i], x[u].value[i], products);
        }
      }
    }
    const float share = team_sum(products, team, shared, turn) * inv_rms * inv_rms / static_cast<float>(dim);
    for (int begin = 0; begin < words; begin += held) {
      if (!at_once) load(begin);
#pragma unroll
      for (int u = 0; u < kNormHeld; ++u) {
        const int at = begin + lane + u * team;
        if (at >= words) continue;
        Wide grad_x;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          grad_x.value[i] = inv_rms * (grad[u].value[i] * weight[u].value[i] - x[u].value[i] * share);
        }
        if constexpr (kAdd) {
          const Wide grad_sum = load_word<Float32, kCount>(grad_sum_ND + row * grad_sum_stride, at);
          NormWord<T, kCount> grad_added;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            grad_x.value[i] += grad_sum.value[i];
            grad_added.value[i] = grad_x.value[i];
          }
          store_word<T, kCount>(grad_added_ND + row * dim, at, grad_added);
        }
        store_word<Float32, kCount>(grad_x_ND + row * dim, at, grad_x);
        if constexpr (kWeight) {
          uint32_t* part_D = grad_weight_PD + first * dim;
          if (!at_once && row != first) grad_weight[u] = load_word<Float32, kCount>(part_D, at);
          if (!at_once && row == first) grad_weight[u] = Wide(typename Wide::Word{});
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            grad_weight[u].value[i] = fmaf(grad[u].value[i] * inv_rms, x[u].value[i], grad_weight[u].value[i]);
          }
          if (!at_once) store_word<Float32, kCount>(part_D, at, grad_weight[u]);
        }
      }
    }
  }
  if constexpr (kWeight) {
    if (!at_once || first >= rows) return;
#pragma unroll
    for (int u = 0; u < kNormHeld; ++u) {
      const int at = lane + u * team;
      if (at < words) store_word<Float32, kCount>(grad_weight_PD + first * dim, at, grad_weight[u]);
    }
  }
}

// grad_weight_D: the sum of the parts, in their order.
__global__ void __launch_bounds__(kNormSumThreads) rms_norm_sum_parts_kernel(
    const float* __restrict__ grad_weight_PD, float* __restrict__ grad_weight_D, int parts, int dim) {
  __shared__ float shared[kNormSumThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kWarp) + lane;
  float total = 0.f;
  if (column < dim) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kNormSumThreads / kWarp) {
      total += grad_weight_PD[part * dim + column];
    }
  }
  shared[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || column >= dim) return;
  for (int other = 1; other < kNormSumThreads / kWarp; ++other) total += shared[other][lane];
  grad_weight_D[column] = total;
}

}  // namespace cascade
