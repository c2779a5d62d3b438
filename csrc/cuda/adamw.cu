// Launcher of adamw_: a launch that counts the step of 500 tensors, and one that updates 512 (64 where the driver is
// older than CUDA 12.1).
#include "adamw.cuh"

#include <cmath>
#include <optional>
#include <vector>

#include "launch.cuh"

namespace cascade {

using Tensors = std::vector<Tensor>;

static void count_steps(const Tensors& steps, const float* found_inf) {
  for (size_t begin = 0; begin < steps.size(); begin += kMostCounters) {
    StepCounters counters;
    int count = 0;
    for (size_t i = begin; i < steps.size() && count < kMostCounters; ++i) {
      counters.step[count++] = static_cast<float*>(steps[i].mutable_data_ptr());
    }
    adamw_count_kernel<<<1, 512, 0, current_stream(steps[0])>>>(counters, count, found_inf);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <int kMost>
static void update(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& steps, const Tensors& copies, const AdamWSettings& settings) {
  AdamWList<kMost> list;
  int count = 0;
  int64_t blocks = 0;
  const auto launch = [&] {
    if (count == 0) return;
    adamw_kernel<kMost><<<blocks, kAdamWThreads, 0, current_stream(params[0])>>>(list, count, settings);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    count = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel(), needed = blocks_for(n, kAdamWChunk);
    if (n == 0) continue;
    if (count == kMost || blocks + needed > INT32_MAX) launch();
    list.param[count] = static_cast<float*>(params[i].mutable_data_ptr());
    list.grad[count] = grads[i].const_data_ptr();
    list.moment1[count] = static_cast<float*>(exp_avgs[i].mutable_data_ptr());
    list.moment2[count] = static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr());
    const bool copied = copies[i].numel() > 0;
    list.copy[count] = copied ? copies[i].mutable_data_ptr() : nullptr;
    list.step[count] = static_cast<const float*>(steps[i].const_data_ptr());
    list.n[count] = n;
    list.first[count] = static_cast<int32_t>(blocks);
    list.grad_kind[count] = kind_of(grads[i].scalar_type());
    list.copy_kind[count] = copied ? kind_of(copies[i].scalar_type()) : kNoElements;
    blocks += needed;
    ++count;
  }
  launch();
}

void adamw_cuda(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensors& copies, double lr, double beta1, double beta2, double eps,
                double weight_decay, const std::optional<Tensor>& lr_now, const std::optional<Tensor>& grad_scale,
                const std::optional<Tensor>& found_inf) {
  const DeviceGuard guard(params[0].get_device_index());
  const auto number = [](const std::optional<Tensor>& given) {
    return given ? static_cast<const float*>(given->const_data_ptr()) : nullptr;
  };
  const AdamWSettings settings{
      static_cast<float>(beta1), static_cast<float>(1.0 - beta1),       static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2), static_cast<float>(std::log(beta1)), static_cast<float>(std::log(beta2)),
      static_cast<float>(lr), static_cast<float>(weight_decay),         static_cast<float>(eps),
      number(lr_now), number(grad_scale),                               number(found_inf)};
  Tensors contiguous_grads;  // keeps copies alive
  for (const Tensor& grad : grads) contiguous_grads.push_back(torch::stable::contiguous(grad));
  count_steps(steps, settings.found_inf);
#if CUDART_VERSION >= 12010
  int driver = 0;
  STD_CUDA_CHECK(cudaDriverGetVersion(&driver));
  if (params.size() > kFewTensors && driver >= 12010) {
    update<kManyTensors>(params, contiguous_grads, exp_avgs, exp_avg_sqs, steps, copies, settings);
    return;
  }
#endif
  update<kFewTensors>(params, contiguous_grads, exp_avgs, exp_avg_sqs, steps, copies, settings);
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) { m.impl("adamw_", TORCH_BOX(&cascade::adamw_cuda)); }
