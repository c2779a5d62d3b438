// Launcher of cosine_score.
#include "cosine_score.cuh"

#include "launch.cuh"

namespace cascade {

Tensor cosine_score_cuda(const Tensor& h_in_ND, const Tensor& h_out_ND) {
  const DeviceGuard guard(h_in_ND.get_device_index());
  const Tensor a_ND = with_contiguous_rows(h_in_ND), b_ND = with_contiguous_rows(h_out_ND);
  const int64_t rows = a_ND.size(0);
  Tensor score_N = torch::stable::new_empty(a_ND, {rows}, ScalarType::Float);
  if (rows == 0) return score_N;
  const bool wide = rows_aligned({&a_ND, &b_ND});
  for_dtype(a_ND.scalar_type(), [&]<class T>() {
    using Bits = typename T::Bits;
    constexpr int kNarrow = sizeof(Bits);
    const auto kernel = wide ? cosine_score_kernel<T, 16> : cosine_score_kernel<T, kNarrow>;
    kernel<<<blocks_for(rows, kScoreThreads / kWarp), kScoreThreads, 0, current_stream(a_ND)>>>(
        static_cast<const Bits*>(a_ND.const_data_ptr()), row_stride(a_ND),
        static_cast<const Bits*>(b_ND.const_data_ptr()), row_stride(b_ND),
        static_cast<float*>(score_N.mutable_data_ptr()), rows, row_elements(a_ND));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return score_N;
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("cosine_score", TORCH_BOX(&cascade::cosine_score_cuda));
}
