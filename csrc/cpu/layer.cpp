// What stands between a layer's matrix products: rms_norm and silu_mul (the gated MLP's silu(gate) * up), and their
// gradients. Each in one pass, float32 inside, rounded once.
//
// Plain loops that the compiler vectorises, compiled for AVX-512, AVX2 and the baseline; sums go into kLanes partial
// sums, because the compiler may not reorder additions by itself.
//
// Shape legend: N rows, D hidden size, F intermediate size, P parts of kRowsPerPart rows.
#include "../common.h"
#include "vectors.h"

namespace cascade_fast {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kRowsPerPart = 32;  // rows whose share of a weight's gradient is summed first: the same for any threads

CASCADE_INLINE float widen(float x) { return x; }
CASCADE_INLINE float widen(Half x) { return static_cast<float>(x); }
CASCADE_INLINE float widen(BFloat16 x) {
  uint16_t half;
  std::memcpy(&half, static_cast<const void*>(&x), sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

CASCADE_INLINE void narrow(float x, float* to) { *to = x; }
CASCADE_INLINE void narrow(float x, Half* to) { *to = static_cast<Half>(x); }
CASCADE_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const auto half = static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
  std::memcpy(static_cast<void*>(to), &half, sizeof(half));
}

CASCADE_INLINE float sum(const float (&lanes)[kLanes]) {
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  return total;
}

struct NormRows {  // all rows contiguous; inv_rms_N (N,)
  const void* x_ND;
  const float* weight_D;
  float* inv_rms_N;
  void* out_ND;
  float eps;
  int64_t d;
};

template <class From, class T>
CASCADE_INLINE void norm_rows(const NormRows& all, int64_t begin, int64_t end) {
  const int64_t d = all.d, whole = d / kLanes * kLanes;
  const float* __restrict weight = all.weight_D;
  for (int64_t n = begin; n < end; ++n) {
    const From* __restrict x = static_cast<const From*>(all.x_ND) + n * d;
    float squares[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) squares[j] += widen(x[i + j]) * widen(x[i + j]);
    }
    for (int64_t i = whole; i < d; ++i) squares[i - whole] += widen(x[i]) * widen(x[i]);
    const float inv_rms = 1.0f / std::sqrt(sum(squares) / static_cast<float>(d) + all.eps);
    all.inv_rms_N[n] = inv_rms;
    T* __restrict out = static_cast<T*>(all.out_ND) + n * d;
    for (int64_t i = 0; i < d; ++i) narrow(widen(x[i]) * inv_rms * weight[i], out + i);
  }
}

struct NormGradRows {
  const void* grad_ND;
  const void* x_ND;
  const float* weight_D;
  const float* inv_rms_N;
  void* grad_x_ND;
  float* grad_weight_PD;  // a row for each part of kRowsPerPart rows
  int64_t n, d;
};

template <class X, class T>
CASCADE_INLINE void norm_grad_parts(const NormGradRows& all, int64_t begin, int64_t end) {
  const int64_t d = all.d, whole = d / kLanes * kLanes;
  const float* __restrict weight = all.weight_D;
  for (int64_t part = begin; part < end; ++part) {
    float* __restrict grad_weight = all.grad_weight_PD + part * d;
    std::memset(grad_weight, 0, d * sizeof(float));
    const int64_t last = std::min(all.n, (part + 1) * kRowsPerPart);
    for (int64_t n = part * kRowsPerPart; n < last; ++n) {
      const T* __restrict grad = static_cast<const T*>(all.grad_ND) + n * d;
      const X* __restrict x = static_cast<const X*>(all.x_ND) + n * d;
      X* __restrict grad_x = static_cast<X*>(all.grad_x_ND) + n * d;
      const float inv_rms = all.inv_rms_N[n];
      float products[kLanes] = {};
      for (int64_t i = 0; i < whole; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) products[j] += widen(grad[i + j]) * weight[i + j] * widen(x[i + j]);
      }
      for (int64_t i = whole; i < d; ++i) products[i - whole] += widen(grad[i]) * weight[i] * widen(x[i]);
      const float share = sum(products) * inv_rms * inv_rms / static_cast<float>(d);
      for (int64_t i = 0; i < d; ++i) {
        const float g = widen(grad[i]), value = widen(x[i]);
        grad_weight[i] += g * value * inv_rms;
        narrow(inv_rms * (g * weight[i] - value * share), grad_x + i);
      }
    }
  }
}

// 1 / (1 + e^-x). The exponential is of -|x|, by Cephes' reduction and polynomial.
CASCADE_INLINE float sigmoid(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the lowest bits
  float y = x < 0.0f ? x : -x;
  y = y < -87.0f ? -87.0f : y;
  const float shifted = y * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = y - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power + 127u) << 23;  // 2^n
  float scale;
  std::memcpy(&scale, &power, sizeof(scale));
  const float e = p * scale;
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

struct Gated {
  const void *gate, *up, *grad;
  void *out, *grad_gate, *grad_up;
};

template <class T, class>
CASCADE_INLINE void silu_mul_items(const Gated& all, int64_t begin, int64_t end) {
  const T* __restrict gate = static_cast<const T*>(all.gate);
  const T* __restrict up = static_cast<const T*>(all.up);
  T* __restrict out = static_cast<T*>(all.out);
  for (int64_t i = begin; i < end; ++i) {
    const float g = widen(gate[i]);
    narrow(g * sigmoid(g) * widen(up[i]), out + i);
  }
}

template <class T, class>
CASCADE_INLINE void silu_mul_grad_items(const Gated& all, int64_t begin, int64_t end) {
  const T* __restrict gate = static_cast<const T*>(all.gate);
  const T* __restrict up = static_cast<const T*>(all.up);
  const T* __restrict grad = static_cast<const T*>(all.grad);
  T* __restrict grad_gate = static_cast<T*>(all.grad_gate);
  T* __restrict grad_up = static_cast<T*>(all.grad_up);
  for (int64_t i = begin; i < end; ++i) {
    const float g = widen(gate[i]), s = sigmoid(g), of_out = widen(grad[i]);
    narrow(of_out * g * s, grad_up + i);
    narrow(of_out * widen(up[i]) * s * (1.0f + g * (1.0f - s)), grad_gate + i);
  }
}

// NAME_for_this_cpu<From, To>(): the body for these dtypes and this CPU.
#if CASCADE_X86
#define CASCADE_TARGETS(NAME, BODY, ARGS)                                                                          \
  template <class From, class To>                                                                                  \
  CASCADE_AVX2 void NAME##_avx2(const ARGS& all, int64_t begin, int64_t end) { BODY<From, To>(all, begin, end); }  \
  template <class From, class To>                                                                                  \
  CASCADE_AVX512 void NAME##_avx512(const ARGS& all, int64_t begin, int64_t end) { BODY<From, To>(all, begin, end); }
#define CASCADE_BEST(NAME)                            \
  if (cpu_has_avx512()) return NAME##_avx512<From, To>; \
  if (cpu_has_avx2()) return NAME##_avx2<From, To>;
#else
#define CASCADE_TARGETS(NAME, BODY, ARGS)
#define CASCADE_BEST(NAME)
#endif

#define CASCADE_BODIES(NAME, BODY, ARGS)                                                                              \
  template <class From, class To>                                                                                     \
  void NAME##_baseline(const ARGS& all, int64_t begin, int64_t end) { BODY<From, To>(all, begin, end); }              \
  CASCADE_TARGETS(NAME, BODY, ARGS)                                                                                   \
  template <class From, class To>                                                                                     \
  void (*NAME##_for_this_cpu())(const ARGS&, int64_t, int64_t) {                                                      \
    CASCADE_BEST(NAME)                                                                                                \
    return NAME##_baseline<From, To>;                                                                                 \
  }                                                                                                                   \
  template <class From>                                                                                               \
  auto NAME##_to(ScalarType to) {                                                                                     \
    return to == ScalarType::BFloat16 ? NAME##_for_this_cpu<From, BFloat16>()                                         \
           : to == ScalarType::Half   ? NAME##_for_this_cpu<From, Half>()                                             \
                                      : NAME##_for_this_cpu<From, float>();                                           \
  }                                                                                                                   \
  auto NAME##_of(ScalarType from, ScalarType to) {                                                                    \
    return from == ScalarType::BFloat16 ? NAME##_to<BFloat16>(to)                                                     \
           : from == ScalarType::Half   ? NAME##_to<Half>(to)                                                         \
                                        : NAME##_to<float>(to);                                                       \
  }

CASCADE_BODIES(norm, norm_rows, NormRows)
CASCADE_BODIES(norm_grad, norm_grad_parts, NormGradRows)
CASCADE_BODIES(gated, silu_mul_items, Gated)
CASCADE_BODIES(gated_grad, silu_mul_grad_items, Gated)

constexpr int64_t kItemsPerBlock = 16 * 1024;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight_D, double eps, ScalarType dtype) {
  const Tensor x_ND = torch::stable::contiguous(x), w_D = torch::stable::contiguous(weight_D);
  const int64_t n = x_ND.size(0), d = x_ND.size(1);
  const Tensor out_ND = torch::stable::new_empty(x_ND, {n, d}, dtype);
  const Tensor inv_rms_N = torch::stable::new_empty(x_ND, {n}, ScalarType::Float);
  const NormRows all{x_ND.const_data_ptr(), w_D.const_data_ptr<float>(), inv_rms_N.mutable_data_ptr<float>(),
                     out_ND.mutable_data_ptr(), static_cast<float>(eps), d};
  const auto body = norm_of(x_ND.scalar_type(), dtype);
  parallel_blocks(n, std::max<int64_t>(1, kItemsPerBlock / std::max<int64_t>(d, 1)),
                  [&](int64_t begin, int64_t end) { body(all, begin, end); });
  return {out_ND, inv_rms_N};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight_D, const Tensor& inv_rms_N) {
  const Tensor grad_ND = torch::stable::contiguous(grad), x_ND = torch::stable::contiguous(x);
  const Tensor w_D = torch::stable::contiguous(weight_D);
  const int64_t n = x_ND.size(0), d = x_ND.size(1), parts = ceil_div(n, kRowsPerPart);
  const Tensor grad_x_ND = torch::stable::new_empty(x_ND, {n, d});
  const Tensor grad_weight_PD = torch::stable::new_empty(w_D, {std::max<int64_t>(parts, 1), d});
  const NormGradRows all{grad_ND.const_data_ptr(), x_ND.const_data_ptr(), w_D.const_data_ptr<float>(),
                         inv_rms_N.const_data_ptr<float>(), grad_x_ND.mutable_data_ptr(),
                         grad_weight_PD.mutable_data_ptr<float>(), n, d};
  const auto body = norm_grad_of(x_ND.scalar_type(), grad_ND.scalar_type());
  parallel_blocks(parts, 1, [&](int64_t begin, int64_t end) { body(all, begin, end); });
  const Tensor grad_weight_D = torch::stable::new_empty(w_D, {d});
  float* total = grad_weight_D.mutable_data_ptr<float>();
  std::memset(total, 0, d * sizeof(float));
  for (int64_t part = 0; part < parts; ++part) {
    const float* share = grad_weight_PD.const_data_ptr<float>() + part * d;
    for (int64_t i = 0; i < d; ++i) total[i] += share[i];
  }
  return {grad_x_ND, grad_weight_D};
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  const Tensor gate_NF = torch::stable::contiguous(gate), up_NF = torch::stable::contiguous(up);
  const Tensor out_NF = torch::stable::new_empty(gate_NF, {gate_NF.size(0), gate_NF.size(1)});
  const Gated all{gate_NF.const_data_ptr(), up_NF.const_data_ptr(), nullptr,
                  out_NF.mutable_data_ptr(), nullptr, nullptr};
  const auto body = gated_of(gate_NF.scalar_type(), gate_NF.scalar_type());
  parallel_blocks(gate_NF.numel(), kItemsPerBlock, [&](int64_t begin, int64_t end) { body(all, begin, end); });
  return out_NF;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Tensor grad_NF = torch::stable::contiguous(grad), gate_NF = torch::stable::contiguous(gate);
  const Tensor up_NF = torch::stable::contiguous(up);
  const Tensor grad_gate_NF = torch::stable::new_empty(gate_NF, {gate_NF.size(0), gate_NF.size(1)});
  const Tensor grad_up_NF = torch::stable::new_empty(gate_NF, {gate_NF.size(0), gate_NF.size(1)});
  const Gated all{gate_NF.const_data_ptr(), up_NF.const_data_ptr(), grad_NF.const_data_ptr(), nullptr,
                  grad_gate_NF.mutable_data_ptr(), grad_up_NF.mutable_data_ptr()};
  const auto body = gated_grad_of(gate_NF.scalar_type(), gate_NF.scalar_type());
  parallel_blocks(gate_NF.numel(), kItemsPerBlock, [&](int64_t begin, int64_t end) { body(all, begin, end); });
  return {grad_gate_NF, grad_up_NF};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward));
}

}  // namespace cascade_fast
