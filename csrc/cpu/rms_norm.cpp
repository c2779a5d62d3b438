// rms_norm and its gradients, each in one pass: float32 in, float32 inside, rounded once to the compute dtype.
//
// Plain loops that the compiler vectorises, for each instruction set by itself: the Vectors of targets.h go unused.
// Sums go into kLanes partial sums, because the compiler may not reorder additions by itself.
//
// Shape legend: N rows, D hidden size, P parts of kRowsPerPart rows.
#include "scalars.h"

#include <cmath>
#include <cstring>

namespace cascade_fast {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kRowsPerPart = 32;  // rows whose share of a weight's gradient is summed first: the same for any threads

CASCADE_INLINE float sum(const float (&lanes)[kLanes]) {
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  return total;
}

struct NormRows {  // all rows contiguous; inv_rms_N (N,)
  const float* x_ND;
  const void* added_ND;  // of out's dtype; null: nothing is added
  float* sum_ND;         // x + added
  const float* weight_D;
  float* inv_rms_N;
  void* out_ND;
  float eps;
  int64_t d;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

template <class V, class T>
void NormRows::run(int64_t begin, int64_t end) const {
  const int64_t d = this->d, whole = d / kLanes * kLanes;  // a copy of d: no store below can change it
  const float* __restrict weight = weight_D;
  for (int64_t n = begin; n < end; ++n) {
    const float* __restrict x = x_ND + n * d;
    if (added_ND != nullptr) {
      const T* __restrict added = static_cast<const T*>(added_ND) + n * d;
      float* __restrict sum = sum_ND + n * d;
      for (int64_t i = 0; i < d; ++i) sum[i] = x[i] + widen(added[i]);
      x = sum;
    }
    float squares[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) squares[j] += x[i + j] * x[i + j];
    }
    for (int64_t i = whole; i < d; ++i) squares[i - whole] += x[i] * x[i];
    const float inv_rms = 1.0f / std::sqrt(sum(squares) / static_cast<float>(d) + eps);
    inv_rms_N[n] = inv_rms;
    T* __restrict out = static_cast<T*>(out_ND) + n * d;
    for (int64_t i = 0; i < d; ++i) narrow(x[i] * inv_rms * weight[i], out + i);
  }
}

struct NormGradRows {
  const void* grad_ND;
  const float* x_ND;
  const float* weight_D;
  const float* inv_rms_N;
  const float* grad_sum_ND;  // what else has come back to x; null: nothing
  float* grad_x_ND;
  void* grad_added_ND;  // the same in grad's dtype, for what was added; null: nobody asks
  float* grad_weight_PD;  // a row for each part of kRowsPerPart rows; null: nobody asks
  int64_t n, d;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

template <class V, class T>
void NormGradRows::run(int64_t begin, int64_t end) const {
  const int64_t d = this->d, whole = d / kLanes * kLanes;  // a copy of d: no store below can change it
  const float* __restrict weight = weight_D;
  for (int64_t part = begin; part < end; ++part) {
    float* __restrict grad_weight = grad_weight_PD == nullptr ? nullptr : grad_weight_PD + part * d;
    if (grad_weight != nullptr) std::memset(grad_weight, 0, d * sizeof(float));
    const int64_t last = std::min(n, (part + 1) * kRowsPerPart);
    for (int64_t row = part * kRowsPerPart; row < last; ++row) {
      const T* __restrict grad = static_cast<const T*>(grad_ND) + row * d;
      const float* __restrict x = x_ND + row * d;
      float* __restrict grad_x = grad_x_ND + row * d;
      const float inv_rms = inv_rms_N[row];
      float products[kLanes] = {};
      for (int64_t i = 0; i < whole; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) products[j] += widen(grad[i + j]) * weight[i + j] * x[i + j];
      }
      for (int64_t i = whole; i < d; ++i) products[i - whole] += widen(grad[i]) * weight[i] * x[i];
      const float share = sum(products) * inv_rms * inv_rms / static_cast<float>(d);
      for (int64_t i = 0; i < d; ++i) grad_x[i] = inv_rms * (widen(grad[i]) * weight[i] - x[i] * share);
      if (grad_sum_ND != nullptr) {
        const float* __restrict grad_sum = grad_sum_ND + row * d;
        T* __restrict grad_added = static_cast<T*>(grad_added_ND) + row * d;
        for (int64_t i = 0; i < d; ++i) {
          grad_x[i] += grad_sum[i];
          narrow(grad_x[i], grad_added + i);
        }
      }
      if (grad_weight == nullptr) continue;
      for (int64_t i = 0; i < d; ++i) grad_weight[i] += widen(grad[i]) * x[i] * inv_rms;
    }
  }
}

constexpr int64_t kItemsPerBlock = 16 * 1024;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight_D, double eps, ScalarType dtype) {
  const Tensor x_ND = torch::stable::contiguous(x), w_D = torch::stable::contiguous(weight_D);
  const int64_t n = x_ND.size(0), d = x_ND.size(1);
  const Tensor out_ND = torch::stable::new_empty(x_ND, {n, d}, dtype);
  const Tensor inv_rms_N = torch::stable::new_empty(x_ND, {n}, ScalarType::Float);
  const NormRows rows{x_ND.const_data_ptr<float>(), nullptr, nullptr, w_D.const_data_ptr<float>(), inv_rms_N.mutable_data_ptr<float>(),
                      out_ND.mutable_data_ptr(), static_cast<float>(eps), d};
  const auto run = run_for_this_cpu<NormRows>(dtype);
  parallel_blocks(n, std::max<int64_t>(1, kItemsPerBlock / std::max<int64_t>(d, 1)),
                  [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  return {out_ND, inv_rms_N};
}

// Gradients of x, of what was added to it (`grad_sum`: what else has come back to the sum; null: nothing was) and of the
// weight, empty unless asked for.
std::tuple<Tensor, Tensor, Tensor> norm_grads(const Tensor* grad_sum, const Tensor& grad, const Tensor& x,
                                              const Tensor& weight_D, const Tensor& inv_rms_N, bool weight_grad) {
  const Tensor grad_ND = torch::stable::contiguous(grad), x_ND = torch::stable::contiguous(x);
  const Tensor w_D = torch::stable::contiguous(weight_D);
  const Tensor grad_sum_ND = grad_sum == nullptr ? x_ND : torch::stable::contiguous(*grad_sum);
  const int64_t n = x_ND.size(0), d = x_ND.size(1), parts = ceil_div(n, kRowsPerPart);
  const Tensor grad_x_ND = torch::stable::new_empty(x_ND, {n, d});
  const Tensor grad_added_ND = torch::stable::new_empty(grad_ND, {grad_sum == nullptr ? 0 : n, d});
  const Tensor grad_weight_PD = torch::stable::new_empty(x_ND, {weight_grad ? std::max<int64_t>(parts, 1) : 0, d});
  const NormGradRows rows{grad_ND.const_data_ptr(), x_ND.const_data_ptr<float>(), w_D.const_data_ptr<float>(),
                          inv_rms_N.const_data_ptr<float>(),
                          grad_sum == nullptr ? nullptr : grad_sum_ND.const_data_ptr<float>(),
                          grad_x_ND.mutable_data_ptr<float>(),
                          grad_sum == nullptr ? nullptr : grad_added_ND.mutable_data_ptr(),
                          weight_grad ? grad_weight_PD.mutable_data_ptr<float>() : nullptr, n, d};
  const auto run = run_for_this_cpu<NormGradRows>(grad_ND.scalar_type());
  parallel_blocks(parts, 1, [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  const Tensor grad_weight_D = torch::stable::new_empty(x_ND, {weight_grad ? d : 0});
  if (!weight_grad) return {grad_x_ND, grad_added_ND, grad_weight_D};
  float* total = grad_weight_D.mutable_data_ptr<float>();
  std::memset(total, 0, d * sizeof(float));
  for (int64_t part = 0; part < parts; ++part) {
    const float* share = grad_weight_PD.const_data_ptr<float>() + part * d;
    for (int64_t i = 0; i < d; ++i) total[i] += share[i];
  }
  return {grad_x_ND, grad_added_ND, grad_weight_D};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inv_rms, bool weight_grad) {
  const auto [grad_x_ND, _, grad_weight_D] = norm_grads(nullptr, grad, x, weight, inv_rms, weight_grad);
  return {grad_x_ND, grad_weight_D};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& added, const Tensor& weight_D, double eps) {
  const Tensor x_ND = torch::stable::contiguous(x), added_ND = torch::stable::contiguous(added);
  const Tensor w_D = torch::stable::contiguous(weight_D);
  const int64_t n = x_ND.size(0), d = x_ND.size(1);
  const Tensor sum_ND = torch::stable::new_empty(x_ND, {n, d});
  const Tensor out_ND = torch::stable::new_empty(added_ND, {n, d});
  const Tensor inv_rms_N = torch::stable::new_empty(x_ND, {n});
  const NormRows rows{x_ND.const_data_ptr<float>(), added_ND.const_data_ptr(), sum_ND.mutable_data_ptr<float>(),
                      w_D.const_data_ptr<float>(), inv_rms_N.mutable_data_ptr<float>(), out_ND.mutable_data_ptr(),
                      static_cast<float>(eps), d};
  const auto run = run_for_this_cpu<NormRows>(added.scalar_type());
  parallel_blocks(n, std::max<int64_t>(1, kItemsPerBlock / std::max<int64_t>(d, 1)),
                  [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  return {sum_ND, out_ND, inv_rms_N};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(const Tensor& grad_sum, const Tensor& grad, const Tensor& sum,
                                                         const Tensor& weight, const Tensor& inv_rms,
                                                         bool weight_grad) {
  return norm_grads(&grad_sum, grad, sum, weight, inv_rms, weight_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}

}  // namespace cascade_fast
