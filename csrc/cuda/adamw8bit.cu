// Launcher of adamw8bit: a launch for each 64 tensors of one step number and one dtype of gradients.
#include "adamw8bit.cuh"

#include <cmath>
#include <optional>
#include <vector>

#include "launch.cuh"

namespace cascade {

void adamw8bit_cuda(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& state1, const std::vector<Tensor>& state2,
                    const std::vector<Tensor>& absmax1, const std::vector<Tensor>& absmax2,
                    const std::vector<int64_t>& steps, double lr, double beta1, double beta2, double eps,
                    double weight_decay, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const DeviceGuard guard(params[0].get_device_index());
  const auto number = [](const std::optional<Tensor>& given) {
    return given ? static_cast<const float*>(given->const_data_ptr()) : nullptr;
  };
  StepSettings settings{static_cast<float>(beta1), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
                        static_cast<float>(1.0 - beta2), static_cast<float>(std::log(beta1)),
                        static_cast<float>(std::log(beta2)), static_cast<float>(lr),
                        static_cast<float>(1.0 - lr * weight_decay), static_cast<float>(eps), 0.0f,
                        number(grad_scale), number(found_inf), number(skipped)};
  StepList list;
  int count = 0;
  int64_t blocks = 0;
  ScalarType dtype = ScalarType::Float;
  const auto launch = [&] {
    if (count == 0) return;
    for_dtype(dtype, [&]<class T>() {
      adamw8bit_kernel<T><<<blocks, kStepThreads, 0, current_stream(params[0])>>>(list, count, settings);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    count = 0;
    blocks = 0;
  };
  std::vector<Tensor> contiguous_grads;  // keeps copies alive
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel(), needed = blocks_for(n, kStepChunk);
    if (n == 0) continue;
    contiguous_grads.push_back(torch::stable::contiguous(grads[i]));
    const Tensor& grad = contiguous_grads.back();
    const auto step = static_cast<float>(steps[i]);
    const bool fits = count < kMaxStepTensors && blocks + needed <= INT32_MAX;
    if (!fits || step != settings.step || grad.scalar_type() != dtype) launch();
    settings.step = step;
    dtype = grad.scalar_type();
    const bool coded = state1[i].scalar_type() == ScalarType::Byte;
    list.param[count] = static_cast<float*>(params[i].mutable_data_ptr());
    list.grad[count] = grad.const_data_ptr();
    list.state1[count] = state1[i].mutable_data_ptr();
    list.state2[count] = state2[i].mutable_data_ptr();
    list.absmax1[count] = coded ? static_cast<float*>(absmax1[i].mutable_data_ptr()) : nullptr;
    list.absmax2[count] = coded ? static_cast<float*>(absmax2[i].mutable_data_ptr()) : nullptr;
    list.n[count] = n;
    list.first[count] = static_cast<int32_t>(blocks);
    blocks += needed;
    ++count;
  }
  launch();
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("adamw8bit", TORCH_BOX(&cascade::adamw8bit_cuda));
}
