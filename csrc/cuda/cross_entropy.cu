// Launcher of cross_entropy_.
#include "cross_entropy.cuh"

#include <tuple>

#include "launch.cuh"

namespace cascade {

std::tuple<Tensor, Tensor> cross_entropy_cuda(const Tensor& logits_CV, const Tensor& labels_C, bool grad,
                                              double scale) {
  const DeviceGuard guard(logits_CV.get_device_index());
  const int64_t rows = logits_CV.size(0);
  Tensor loss_C = torch::stable::new_empty(logits_CV, {rows}, ScalarType::Float);
  Tensor entropy_C = torch::stable::new_empty(logits_CV, {rows}, ScalarType::Float);
  if (rows == 0) return {loss_C, entropy_C};
  const bool wide = rows_aligned({&logits_CV});
  for_dtype(logits_CV.scalar_type(), [&]<class T>() {
    using Bits = typename T::Bits;
    constexpr int kNarrow = sizeof(Bits);
    const auto kernel = wide ? cross_entropy_kernel<T, 16> : cross_entropy_kernel<T, kNarrow>;
    kernel<<<blocks_for(rows, 1), kLossThreads, 0, current_stream(logits_CV)>>>(
        static_cast<Bits*>(logits_CV.mutable_data_ptr()), labels_C.const_data_ptr<int64_t>(), labels_C.stride(0),
        loss_C.mutable_data_ptr<float>(), entropy_C.mutable_data_ptr<float>(), row_elements(logits_CV), grad,
        static_cast<float>(scale));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss_C, entropy_C};
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cascade::cross_entropy_cuda));
}
