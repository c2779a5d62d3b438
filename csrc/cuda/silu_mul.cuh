// silu_mul: silu(gate) * up of a gated MLP, and its gradients, each in one pass; float32 inside, rounded once.
//
// Shape legend: N rows, F intermediate size. Contiguous matrices come as one row.
#pragma once

#include "numeric.cuh"

namespace cascade {

constexpr int kSiluThreads = 256;
constexpr int kSiluUnroll = 2;  // words of each input in flight per thread

// 1 / (1 + e^-x), without e of a large number.
__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x)), inverse = __fdividef(1.f, 1.f + e);
  return x < 0.f ? e * inverse : inverse;
}

struct SiluMul {
  static constexpr int kInputs = 2, kOutputs = 1;  // gate, up
  static __device__ void apply(const float (&in)[kInputs], float (&out)[kOutputs]) {
    out[0] = in[0] * sigmoid(in[0]) * in[1];
  }
};

struct SiluMulGrad {
  static constexpr int kInputs = 3, kOutputs = 2;  // grad, gate, up; grad_gate, grad_up
  static __device__ void apply(const float (&in)[kInputs], float (&out)[kOutputs]) {
    const float share = sigmoid(in[1]), silu = in[1] * share;
    out[0] = in[0] * in[2] * (share + silu * (1.f - share));
    out[1] = in[0] * silu;
  }
};

template <class T, class Body>
struct SiluRows {
  const typename T::Bits* in_NF[Body::kInputs];
  int64_t stride[Body::kInputs];  // elements
  typename T::Bits* out_NF[Body::kOutputs];  // contiguous
  int64_t dim, blocks_a_row;
};

// Body::apply on every element. With kBytes = 16 every row starts on 16 bytes.
template <class T, int kBytes, class Body>
__global__ void __launch_bounds__(kSiluThreads) silu_mul_kernel(const SiluRows<T, Body> rows) {
  using Pack = Elements<T, kBytes>;
  using Word = typename Pack::Word;
  const int64_t row = blockIdx.x / rows.blocks_a_row, block = blockIdx.x % rows.blocks_a_row;
  const int64_t words = rows.dim / Pack::kCount;
  const int64_t first = block * (kSiluThreads * kSiluUnroll) + threadIdx.x;
  Pack in[kSiluUnroll][Body::kInputs];
#pragma unroll
  for (int u = 0; u < kSiluUnroll; ++u) {
    const int64_t at = first + u * kSiluThreads;
    if (at >= words) continue;
#pragma unroll
    for (int k = 0; k < Body::kInputs; ++k) {
      in[u][k] = Pack(reinterpret_cast<const Word*>(rows.in_NF[k] + row * rows.stride[k])[at]);
    }
  }
#pragma unroll
  for (int u = 0; u < kSiluUnroll; ++u) {
    const int64_t at = first + u * kSiluThreads;
    if (at >= words) continue;
    Pack out[Body::kOutputs];
#pragma unroll
    for (int i = 0; i < Pack::kCount; ++i) {
      float x[Body::kInputs], y[Body::kOutputs];
#pragma unroll
      for (int k = 0; k < Body::kInputs; ++k) x[k] = in[u][k].value[i];
      Body::apply(x, y);
#pragma unroll
      for (int k = 0; k < Body::kOutputs; ++k) out[k].value[i] = y[k];
    }
#pragma unroll
    for (int k = 0; k < Body::kOutputs; ++k) {
      reinterpret_cast<Word*>(rows.out_NF[k] + row * rows.dim)[at] = out[k].word();
    }
  }
  // Columns that do not fill a word, by the row's last block.
  const int64_t d = words * Pack::kCount + threadIdx.x;
  if (block != rows.blocks_a_row - 1 || d >= rows.dim) return;
  float x[Body::kInputs], y[Body::kOutputs];
#pragma unroll
  for (int k = 0; k < Body::kInputs; ++k) x[k] = T::load(rows.in_NF[k][row * rows.stride[k] + d]);
  Body::apply(x, y);
#pragma unroll
  for (int k = 0; k < Body::kOutputs; ++k) rows.out_NF[k][row * rows.dim + d] = T::store(y[k]);
}

}  // namespace cascade
