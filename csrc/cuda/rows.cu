// Launchers of gather_rows and scatter_rows.
#include "rows.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.cuh"

namespace cascade {

constexpr int kRowsPerBlock = kRowThreads / kWarp;

template <class Word>
void launch_gather(
    const Tensor& hidden_ND, const Tensor& index_K, const Tensor& hidden_KD, const CarriedList& carried, bool rows) {
  const int64_t k = index_K.size(0), row_bytes = hidden_ND.size(1) * hidden_ND.element_size();
  const int64_t row_blocks = rows ? blocks_for(k, kRowsPerBlock) : 0;
  const int64_t carried_blocks = carried.count > 0 ? blocks_for(k, kRowThreads) : 0;
  if (row_blocks + carried_blocks == 0) return;
  const int64_t blocks = blocks_for(row_blocks + carried_blocks, 1);
  gather_rows_kernel<Word><<<blocks, kRowThreads, 0, current_stream(hidden_ND)>>>(
      static_cast<const Word*>(hidden_ND.const_data_ptr()),
      row_stride(hidden_ND) * static_cast<int64_t>(hidden_ND.element_size()) / static_cast<int64_t>(sizeof(Word)),
      static_cast<const int64_t*>(index_K.const_data_ptr()), static_cast<Word*>(hidden_KD.mutable_data_ptr()), k,
      static_cast<int>(row_bytes / sizeof(Word)), row_blocks, carried);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, std::vector<Tensor>> gather_rows_cuda(
    const Tensor& hidden, const Tensor& index, const std::vector<Tensor>& carried) {
  const DeviceGuard guard(hidden.get_device_index());
  const Tensor hidden_ND = with_contiguous_rows(hidden), index_K = torch::stable::contiguous(index);
  const int64_t k = index_K.size(0);
  row_elements(hidden_ND);  // checks the length
  Tensor hidden_KD = torch::stable::new_empty(hidden_ND, {k, hidden_ND.size(1)});
  std::vector<Tensor> gathered;
  for (const Tensor& array_N : carried) gathered.push_back(torch::stable::new_empty(array_N, {k}));
  if (k == 0) return {hidden_KD, gathered};

  const bool wide = rows_aligned({&hidden_ND, &hidden_KD});
  const auto launch = wide ? launch_gather<uint4> : hidden_ND.element_size() == 4 ? launch_gather<uint32_t>
                                                                                 : launch_gather<uint16_t>;
  // One launch, unless more than kMaxCarried arrays travel along.
  bool rows = hidden_ND.size(1) > 0;
  for (size_t first = 0; first == 0 || first < carried.size(); first += kMaxCarried) {
    CarriedList list{};
    for (size_t i = first; i < std::min(first + kMaxCarried, carried.size()); ++i) {
      const int64_t stride = carried[i].size(0) > 1 ? carried[i].stride(0) : 1;
      list.array[list.count++] = {carried[i].const_data_ptr(), gathered[i].mutable_data_ptr(), stride,
                                  static_cast<int64_t>(carried[i].element_size())};
    }
    launch(hidden_ND, index_K, hidden_KD, list, rows);
    rows = false;
  }
  return {hidden_KD, gathered};
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
  int32_t* slot_ptr = nullptr;
  Tensor slot_N = out_ND;  // replaced where it is needed
  if (k > 0) {
    slot_N = torch::stable::new_empty(into_ND, {n}, ScalarType::Int);
    slot_ptr = static_cast<int32_t*>(slot_N.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(slot_ptr, 0xff, n * sizeof(int32_t), stream));
    invert_index_kernel<<<blocks_for(k, kRowThreads), kRowThreads, 0, stream>>>(
        static_cast<const int64_t*>(index_K.const_data_ptr()), k, slot_ptr, n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
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
  m.impl("gather_rows", TORCH_BOX(&cascade::gather_rows_cuda));
  m.impl("scatter_rows", TORCH_BOX(&cascade::scatter_rows_cuda));
}
