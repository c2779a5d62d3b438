// Launcher of scatter_rows: a memset and two kernels; one kernel when nothing is put back.
#include "scatter_rows.cuh"

#include "launch.cuh"

namespace cascade {

Tensor inverse_of(const Tensor& index_K, int64_t rows) {
  const int64_t k = index_K.size(0);
  const cudaStream_t stream = current_stream(index_K);
  const Tensor slot_N = torch::stable::new_empty(index_K, {rows}, ScalarType::Int);
  auto* slot_ptr = static_cast<int32_t*>(slot_N.mutable_data_ptr());
  STD_CUDA_CHECK(cudaMemsetAsync(slot_ptr, 0xff, rows * sizeof(int32_t), stream));
  scatter_rows_invert_kernel<<<blocks_for(k, kRowThreads), kRowThreads, 0, stream>>>(
      static_cast<const int64_t*>(index_K.const_data_ptr()), k, slot_ptr, rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return slot_N;
}

Tensor scatter_rows_cuda(const Tensor& rows, const Tensor& index, const Tensor& into, bool add) {
  const DeviceGuard guard(into.get_device_index());
  const Tensor into_ND = with_contiguous_rows(into), rows_KD = with_contiguous_rows(rows);
  const Tensor index_K = torch::stable::contiguous(index);
  const int64_t n = into_ND.size(0), k = index_K.size(0);
  const int dim = row_elements(into_ND);
  Tensor out_ND = torch::stable::new_empty(into_ND, {n, dim});
  if (n == 0 || dim == 0) return out_ND;
  const cudaStream_t stream = current_stream(into_ND);

  // slot_N says which row of rows_KD, if any, goes where. It costs 4 bytes a row written and read, far less than
  // copying all of `into` and then writing K rows over it, and the main kernel reads every row just once.
  const Tensor slot_N = k > 0 ? inverse_of(index_K, n) : index_K;
  const auto* slot_ptr = k > 0 ? static_cast<const int32_t*>(slot_N.const_data_ptr()) : nullptr;
  const bool wide = rows_aligned({&into_ND, &rows_KD, &out_ND});
  for_dtype(into_ND.scalar_type(), [&]<class T>() {
    const auto launch = [&]<int kBytes>() {
      using Word = typename WordOf<kBytes>::type;
      constexpr int kCount = Elements<T, kBytes>::kCount;
      scatter_rows_kernel<T, kBytes><<<blocks_for(n, kRowsPerBlock), kRowThreads, 0, stream>>>(
          static_cast<const Word*>(rows_KD.const_data_ptr()), row_stride(rows_KD) / kCount, slot_ptr,
          static_cast<const Word*>(into_ND.const_data_ptr()), row_stride(into_ND) / kCount,
          static_cast<Word*>(out_ND.mutable_data_ptr()), n, dim / kCount, add);
    };
    if (wide) return launch.template operator()<16>();
    launch.template operator()<static_cast<int>(sizeof(typename T::Bits))>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out_ND;
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("scatter_rows", TORCH_BOX(&cascade::scatter_rows_cuda));
}
