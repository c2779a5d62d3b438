// Launcher of grad_norm: a launch for each 190 gradients, and one.
#include "grad_norm.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "launch.cuh"

namespace cascade {

std::tuple<Tensor, Tensor, Tensor> grad_norm_cuda(
    const std::vector<Tensor>& grads, const std::optional<Tensor>& scale, double clip) {
  const DeviceGuard guard(grads[0].get_device_index());
  const cudaStream_t stream = current_stream(grads[0]);
  std::vector<Tensor> contiguous_grads;  // keeps copies alive
  int64_t all_blocks = 0;
  for (const Tensor& grad : grads) {
    contiguous_grads.push_back(torch::stable::contiguous(grad));
    all_blocks += blocks_for(grad.numel(), kGradNormChunk);
  }
  const Tensor parts = torch::stable::new_empty(grads[0], {all_blocks}, ScalarType::Float);
  auto* next_part = static_cast<float*>(parts.mutable_data_ptr());
  GradList list;
  int count = 0;
  int64_t blocks = 0;
  const auto launch = [&] {
    if (count == 0) return;
    grad_norm_parts_kernel<<<blocks, kGradNormThreads, 0, stream>>>(list, count, next_part);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    next_part += blocks;
    count = 0;
    blocks = 0;
  };
  for (const Tensor& grad : contiguous_grads) {
    const int64_t n = grad.numel(), needed = blocks_for(n, kGradNormChunk);
    if (n == 0) continue;
    if (count == kMostGrads || blocks + needed > INT32_MAX) launch();
    list.grad[count] = grad.const_data_ptr();
    list.n[count] = n;
    list.first[count] = static_cast<int32_t>(blocks);
    list.kind[count] = kind_of(grad.scalar_type());
    blocks += needed;
    ++count;
  }
  launch();
  const auto number = [&] { return torch::stable::new_empty(grads[0], {}, ScalarType::Float); };
  const Tensor norm = number(), factor = number(), found_inf = number();
  grad_norm_kernel<<<1, kGradNormThreads, 0, stream>>>(
      static_cast<const float*>(parts.const_data_ptr()), all_blocks,
      scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr, static_cast<float>(clip),
      static_cast<float*>(norm.mutable_data_ptr()), static_cast<float*>(factor.mutable_data_ptr()),
      static_cast<float*>(found_inf.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {norm, factor, found_inf};
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) { m.impl("grad_norm", TORCH_BOX(&cascade::grad_norm_cuda)); }
