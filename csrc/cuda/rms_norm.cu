// Launchers of rms_norm and add_rms_norm, one kernel each, and of their gradients: one more where the weight learns.
#include "rms_norm.cuh"

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace cascade {

inline const uint32_t* float_bits(const Tensor& tensor) {
  return static_cast<const uint32_t*>(tensor.const_data_ptr());
}

inline uint32_t* mutable_float_bits(const Tensor& tensor) { return static_cast<uint32_t*>(tensor.mutable_data_ptr()); }

// How a kernel is launched for rows of `dim` elements, kCount at a time.
struct NormLaunch {
  int team, threads;
  int64_t blocks, teams;

  NormLaunch(int64_t rows, int dim, int count, int64_t most_teams) {
    team = norm_team(dim / count);
    threads = team == kWarp ? kNormSharedBlock : team;
    const int64_t block_teams = threads / team;
    blocks = std::min(kNormBlocks, blocks_for(std::min(rows, most_teams), block_teams));
    teams = std::min(rows, blocks * block_teams);
  }
};

// Calls run.template operator()<T, kCount>().
template <class Run>
void for_norm(
    ScalarType dtype, int dim, const Tensor& weight_D, std::initializer_list<const Tensor*> matrices, Run run) {
  const bool weight_aligned = reinterpret_cast<uintptr_t>(weight_D.const_data_ptr()) % 16 == 0;
  const bool wide = dim % 4 == 0 && weight_aligned && rows_aligned(matrices);
  for_dtype(dtype, [&]<class T>() {
    if (wide) return run.template operator()<T, 4>();
    run.template operator()<T, 1>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, ScalarType dtype) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor x_ND = with_contiguous_rows(x), weight_D = torch::stable::contiguous(weight);
  const int64_t rows = x_ND.size(0);
  const int dim = row_elements(x_ND);
  const Tensor out_ND = torch::stable::new_empty(x_ND, {rows, dim}, dtype);
  const Tensor inv_rms_N = torch::stable::new_empty(x_ND, {rows});
  if (rows == 0) return {out_ND, inv_rms_N};
  for_norm(dtype, dim, weight_D, {&x_ND, &out_ND}, [&]<class T, int kCount>() {
    const NormLaunch shape(rows, dim, kCount, rows);
    rms_norm_kernel<T, kCount, false><<<shape.blocks, shape.threads, 0, current_stream(x_ND)>>>(
        float_bits(x_ND), row_stride(x_ND), nullptr, 0, float_bits(weight_D), nullptr,
        static_cast<typename T::Bits*>(out_ND.mutable_data_ptr()), static_cast<float*>(inv_rms_N.mutable_data_ptr()),
        rows, dim, static_cast<float>(eps), shape.team);
  });
  return {out_ND, inv_rms_N};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cuda(
    const Tensor& x, const Tensor& added, const Tensor& weight, double eps) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor x_ND = with_contiguous_rows(x), added_ND = with_contiguous_rows(added);
  const Tensor weight_D = torch::stable::contiguous(weight);
  const int64_t rows = x_ND.size(0);
  const int dim = row_elements(x_ND);
  const Tensor sum_ND = torch::stable::new_empty(x_ND, {rows, dim});
  const Tensor out_ND = torch::stable::new_empty(added_ND, {rows, dim});
  const Tensor inv_rms_N = torch::stable::new_empty(x_ND, {rows});
  if (rows == 0) return {sum_ND, out_ND, inv_rms_N};
  for_norm(added_ND.scalar_type(), dim, weight_D, {&x_ND, &added_ND, &sum_ND, &out_ND}, [&]<class T, int kCount>() {
    const NormLaunch shape(rows, dim, kCount, rows);
    rms_norm_kernel<T, kCount, true><<<shape.blocks, shape.threads, 0, current_stream(x_ND)>>>(
        float_bits(x_ND), row_stride(x_ND), static_cast<const typename T::Bits*>(added_ND.const_data_ptr()),
        row_stride(added_ND), float_bits(weight_D), mutable_float_bits(sum_ND),
        static_cast<typename T::Bits*>(out_ND.mutable_data_ptr()), static_cast<float*>(inv_rms_N.mutable_data_ptr()),
        rows, dim, static_cast<float>(eps), shape.team);
  });
  return {sum_ND, out_ND, inv_rms_N};
}

// Gradients of x, of what was added to it (kAdd; `grad_sum`: what else has come back to the sum) and of the weight,
// empty unless asked for.
template <bool kAdd>
std::tuple<Tensor, Tensor, Tensor> norm_grads(const Tensor& grad_sum, const Tensor& grad, const Tensor& x,
                                              const Tensor& weight, const Tensor& inv_rms, bool weight_grad) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad_ND = with_contiguous_rows(grad), x_ND = with_contiguous_rows(x);
  const Tensor grad_sum_ND = with_contiguous_rows(grad_sum);
  const Tensor weight_D = torch::stable::contiguous(weight), inv_rms_N = torch::stable::contiguous(inv_rms);
  const int64_t rows = x_ND.size(0);
  const int dim = row_elements(x_ND);
  const cudaStream_t stream = current_stream(x_ND);
  const Tensor grad_x_ND = torch::stable::new_empty(x_ND, {rows, dim});
  const Tensor grad_added_ND = torch::stable::new_empty(grad_ND, {kAdd ? rows : 0, dim});
  const Tensor grad_weight_D = torch::stable::new_empty(x_ND, {weight_grad ? dim : 0});
  Tensor parts_PD = grad_weight_D;  // replaced where there are parts; it lives until the launches are queued
  int64_t parts = 0;
  if (rows > 0) {
    const auto launch = [&]<class T, int kCount>() {
      const int64_t most = std::min(kNormParts, (rows + kNormRowsPerPart - 1) / kNormRowsPerPart);
      const NormLaunch shape(rows, dim, kCount, weight_grad ? most : rows);
      if (weight_grad) parts_PD = torch::stable::new_empty(x_ND, {parts = shape.teams, dim});
      const auto kernel = weight_grad ? rms_norm_backward_kernel<T, kCount, kAdd, true>
                                      : rms_norm_backward_kernel<T, kCount, kAdd, false>;
      kernel<<<shape.blocks, shape.threads, 0, stream>>>(
          static_cast<const typename T::Bits*>(grad_ND.const_data_ptr()), row_stride(grad_ND), float_bits(x_ND),
          row_stride(x_ND), float_bits(weight_D), static_cast<const float*>(inv_rms_N.const_data_ptr()),
          kAdd ? float_bits(grad_sum_ND) : nullptr, kAdd ? row_stride(grad_sum_ND) : 0, mutable_float_bits(grad_x_ND),
          kAdd ? static_cast<typename T::Bits*>(grad_added_ND.mutable_data_ptr()) : nullptr,
          mutable_float_bits(parts_PD), rows, dim, shape.team);
    };
    const ScalarType dtype = grad_ND.scalar_type();
    if constexpr (kAdd) {
      for_norm(dtype, dim, weight_D, {&grad_ND, &x_ND, &grad_x_ND, &grad_sum_ND, &grad_added_ND}, launch);
    } else {
      for_norm(dtype, dim, weight_D, {&grad_ND, &x_ND, &grad_x_ND}, launch);
    }
  }
  if (weight_grad && dim > 0) {
    rms_norm_sum_parts_kernel<<<blocks_for(dim, kWarp), kNormSumThreads, 0, stream>>>(
        static_cast<const float*>(parts_PD.const_data_ptr()), static_cast<float*>(grad_weight_D.mutable_data_ptr()),
        static_cast<int>(parts), dim);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_x_ND, grad_added_ND, grad_weight_D};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inv_rms, bool weight_grad) {
  const auto [grad_x_ND, _, grad_weight_D] = norm_grads<false>(x, grad, x, weight, inv_rms, weight_grad);
  return {grad_x_ND, grad_weight_D};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward_cuda(
    const Tensor& grad_sum, const Tensor& grad, const Tensor& sum, const Tensor& weight, const Tensor& inv_rms,
    bool weight_grad) {
  return norm_grads<true>(grad_sum, grad, sum, weight, inv_rms, weight_grad);
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&cascade::rms_norm_cuda));
  m.impl("rms_norm_backward", TORCH_BOX(&cascade::rms_norm_backward_cuda));
  m.impl("add_rms_norm", TORCH_BOX(&cascade::add_rms_norm_cuda));
  m.impl("add_rms_norm_backward", TORCH_BOX(&cascade::add_rms_norm_backward_cuda));
}
