// Launcher of gather_rows.
#include "gather_rows.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.cuh"

namespace cascade {

template <class Word>
void launch_gather_rows(
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
  const auto launch = wide                            ? launch_gather_rows<uint4>
                      : hidden_ND.element_size() == 4 ? launch_gather_rows<uint32_t>
                                                      : launch_gather_rows<uint16_t>;
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

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&cascade::gather_rows_cuda));
}
