// silu_mul: silu(gate) * up of a gated MLP, and its gradients, each in one pass; float32 inside, rounded once.
#include "exponential.h"

#include <cstring>

namespace cascade_fast {
namespace {

constexpr int64_t kItemsPerBlock = 16 * 1024;

// 1 / (1 + e^-x), without e of a large number.
template <class V>
CASCADE_INLINE void sigmoid(const typename V::Floats& x, typename V::Floats& result) {
  using Floats = typename V::Floats;
  using Bits = typename V::Bits;
  const Floats negative = (Floats)((Bits)x | 0x80000000u);  // -|x|
  Floats e;
  exp_of_negative<V>(negative, e);
  const Floats inverse = 1.0f / (1.0f + e);
  const auto below = (Bits)(x < 0.0f);
  result = (Floats)((below & (Bits)(e * inverse)) | (~below & (Bits)inverse));
}

// Body::pair on V::kStep values at a time; what is left goes through arrays of that length.
template <class V, class T, class Body, int Inputs, int Outputs>
CASCADE_INLINE void each_pair(
    const Body& body, const T* const (&in)[Inputs], T* const (&out)[Outputs], int64_t begin, int64_t end) {
  using Floats = typename V::Floats;
  constexpr int kStep = V::kStep;
  for (int64_t i = begin; i < end; i += kStep) {
    const int64_t count = std::min<int64_t>(kStep, end - i);
    Floats x[Inputs][2], y[Outputs][2];
    for (int k = 0; k < Inputs; ++k) {
      if (count == kStep) {
        load_pair<V>(in[k] + i, x[k][0], x[k][1]);
      } else {
        T tail[kStep] = {};
        std::memcpy(static_cast<void*>(tail), in[k] + i, count * sizeof(T));
        load_pair<V>(tail, x[k][0], x[k][1]);
      }
    }
    for (int half = 0; half < 2; ++half) body.template pair<V>(x, y, half);
    for (int k = 0; k < Outputs; ++k) {
      if (count == kStep) {
        store_pair<V>(out[k] + i, y[k][0], y[k][1]);
      } else {
        T tail[kStep];
        store_pair<V>(tail, y[k][0], y[k][1]);
        std::memcpy(static_cast<void*>(out[k] + i), tail, count * sizeof(T));
      }
    }
  }
}

struct SiluMul {
  const void *gate, *up;
  void* out;

  template <class V>
  CASCADE_INLINE void pair(
      const typename V::Floats (&x)[2][2], typename V::Floats (&y)[1][2], int half) const {
    typename V::Floats s;
    sigmoid<V>(x[0][half], s);
    y[0][half] = x[0][half] * s * x[1][half];
  }

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    const T* const in[2] = {static_cast<const T*>(gate), static_cast<const T*>(up)};
    T* const outputs[1] = {static_cast<T*>(out)};
    each_pair<V, T>(*this, in, outputs, begin, end);
  }
};

struct SiluMulGrad {
  const void *grad, *gate, *up;
  void *grad_gate, *grad_up;

  template <class V>
  CASCADE_INLINE void pair(
      const typename V::Floats (&x)[3][2], typename V::Floats (&y)[2][2], int half) const {
    typename V::Floats s;
    sigmoid<V>(x[1][half], s);
    const typename V::Floats silu = x[1][half] * s;
    y[0][half] = x[0][half] * x[2][half] * (s + silu * (1.0f - s));
    y[1][half] = x[0][half] * silu;
  }

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    const T* const in[3] = {static_cast<const T*>(grad), static_cast<const T*>(gate), static_cast<const T*>(up)};
    T* const outputs[2] = {static_cast<T*>(grad_gate), static_cast<T*>(grad_up)};
    each_pair<V, T>(*this, in, outputs, begin, end);
  }
};

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  const Tensor gate_NF = torch::stable::contiguous(gate), up_NF = torch::stable::contiguous(up);
  const Tensor out_NF = torch::stable::new_empty(gate_NF, {gate.size(0), gate.size(1)});
  const SiluMul body{gate_NF.const_data_ptr(), up_NF.const_data_ptr(), out_NF.mutable_data_ptr()};
  const auto run = run_for_this_cpu<SiluMul>(gate.scalar_type());
  parallel_blocks(gate.numel(), kItemsPerBlock, [&](int64_t begin, int64_t end) { run(body, begin, end); });
  return out_NF;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Tensor grad_NF = torch::stable::contiguous(grad), gate_NF = torch::stable::contiguous(gate);
  const Tensor up_NF = torch::stable::contiguous(up);
  const Tensor grad_gate_NF = torch::stable::new_empty(gate_NF, {gate.size(0), gate.size(1)});
  const Tensor grad_up_NF = torch::stable::new_empty(gate_NF, {gate.size(0), gate.size(1)});
  const SiluMulGrad body{grad_NF.const_data_ptr(), gate_NF.const_data_ptr(), up_NF.const_data_ptr(),
                         grad_gate_NF.mutable_data_ptr(), grad_up_NF.mutable_data_ptr()};
  const auto run = run_for_this_cpu<SiluMulGrad>(gate.scalar_type());
  parallel_blocks(gate.numel(), kItemsPerBlock, [&](int64_t begin, int64_t end) { run(body, begin, end); });
  return {grad_gate_NF, grad_up_NF};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward));
}

}  // namespace cascade_fast
