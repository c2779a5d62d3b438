// cross_entropy_: loss and entropy of every row of logits and, if asked, scale * (softmax - one_hot) in their place.
//
// One block a row. The row is read in chunks of what the block's registers hold, from its beginning to its end, while
// each thread keeps a running maximum and two sums relative to it. The gradient is written from the end to the
// beginning: the last chunk is still in registers, those before it are read again, the ones read last first, as a
// cache has them still. Rows of up to 98,304 bytes are read once.
//
// Shape legend: C tokens (rows), V vocabulary.
#pragma once

#include <cfloat>

#include "numeric.cuh"

namespace cascade {

constexpr int kLossThreads = 1024;   // with 64 registers each they fill a multiprocessor of sm_75
constexpr int kLossRegisters = 24;   // of each thread, for its part of a chunk
constexpr float kLeastPower = -200.f;  // exp of less is 0 in float32

// exp(d) for d <= 0; results below the smallest normal float32 are 0.
__device__ inline float exp_of_negative(float d) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d * 1.4426950408889634f));
  return e;
}

// d * e where e = exp(d): 0 and not NaN for d = -inf.
__device__ inline float times_exp(float d, float e) { return (d < kLeastPower ? 0.f : d) * e; }

// Sums over some logits of e^d and d e^d, where d is a logit less the largest of them. A NaN is no maximum, but makes
// both sums NaN, as an infinity does.
struct SoftmaxSums {
  float most = -FLT_MAX, e = 0.f, de = 0.f;

  __device__ void relative_to(float higher) {
    const float d = most - higher, factor = exp_of_negative(d);
    de = de * factor + times_exp(d, factor) * e;
    e *= factor;
    most = higher;
  }

  template <int kCount>
  __device__ void add(const float (&logit)[kCount]) {
    float higher = most;
#pragma unroll
    for (int i = 0; i < kCount; ++i) higher = fmaxf(higher, logit[i]);
    if (higher > most) relative_to(higher);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = logit[i] - most, power = exp_of_negative(d);
      e += power;
      de += times_exp(d, power);
    }
  }
};

// In every thread of a block of kLossThreads; each use needs a `partial` of its own.
template <class Op>
__device__ inline float block_reduce(float x, float (&partial)[kLossThreads / kWarp]) {
  x = warp_reduce<Op>(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_reduce<Op>(partial[threadIdx.x % kWarp]);
}

// logits_CV: contiguous. With kBytes = 16 every row starts on 16 bytes and is whole words. A label that is not in
// [0, vocabulary) gives a loss of NaN.
template <class T, int kBytes>
__global__ void __launch_bounds__(kLossThreads)
    cross_entropy_kernel(typename T::Bits* logits_CV, const int64_t* __restrict__ labels_C, int64_t labels_stride,
                         float* __restrict__ loss_C, float* __restrict__ entropy_C, int vocabulary, bool grad,
                         float scale) {
  using Pack = Elements<T, kBytes>;
  using Word = typename Pack::Word;
  constexpr int kHeld = kBytes == 16 ? kLossRegisters / 4 : kLossRegisters;  // words of a thread
  constexpr int kChunk = kHeld * kLossThreads;
  static_assert(kLossThreads == kWarp * kWarp, "block_reduce has a lane for every warp");
  __shared__ float partial[3][kWarp];

  const int64_t row = blockIdx.x;
  auto* logits_V = logits_CV + row * vocabulary;
  auto* words_W = reinterpret_cast<Word*>(logits_V);
  const int words = vocabulary / Pack::kCount;
  const int64_t label = labels_C[row * labels_stride];
  const bool valid = label >= 0 && label < vocabulary;
  const float label_logit = valid && threadIdx.x == 0 ? T::load(logits_V[label]) : __uint_as_float(0x7fc00000);

  // Chunks end at the row's end, rounded up to a warp's words so that warps start on whole sectors.
  const int chunks = (words + kChunk - 1) / kChunk, end = (words + kWarp - 1) / kWarp * kWarp;
  Word held[kHeld];
  const auto at = [&](int chunk, int u) {
    return end - (chunks - chunk) * kChunk + u * kLossThreads + static_cast<int>(threadIdx.x);
  };
  const auto inside = [&](int i) { return static_cast<unsigned>(i) < static_cast<unsigned>(words); };
  const auto load = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (inside(at(chunk, u))) held[u] = words_W[at(chunk, u)];
    }
  };

  SoftmaxSums sums;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    load(chunk);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      if (inside(at(chunk, u))) sums.add(Pack(held[u]).value);
    }
  }
  sums.relative_to(block_reduce<Max>(sums.most, partial[0]));
  const float e = block_reduce<Sum>(sums.e, partial[1]), de = block_reduce<Sum>(sums.de, partial[2]);
  if (threadIdx.x == 0) {
    const float log_e = logf(e);
    loss_C[row] = log_e - (label_logit - sums.most);
    entropy_C[row] = log_e - de / e;
  }
  if (!grad) return;

  const float factor = scale / e;
  const int label_word = valid ? static_cast<int>(label / Pack::kCount) : -1;
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    if (chunk < chunks - 1) load(chunk);
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int i = at(chunk, u);
      if (!inside(i)) continue;
      Pack pack(held[u]);
#pragma unroll
      for (int j = 0; j < Pack::kCount; ++j) pack.value[j] = exp_of_negative(pack.value[j] - sums.most) * factor;
      if (i == label_word) {
#pragma unroll
        for (int j = 0; j < Pack::kCount; ++j) pack.value[j] -= j == label % Pack::kCount ? scale : 0.f;
      }
      words_W[i] = pack.word();
    }
  }
}

}  // namespace cascade
