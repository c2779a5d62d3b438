// Launcher of select_hard: one kernel, preceded by one memset when a row is shared by several blocks.
#include "select_hard.cuh"

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace cascade {

// Blocks that are on the device at once when nothing else runs: the most that may wait for each other.
inline int64_t resident_blocks(int32_t device) {
  int processors = 0, blocks_each = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, select_hard_kernel, kSelectThreads, 0));
  return static_cast<int64_t>(processors) * blocks_each;
}

std::tuple<Tensor, Tensor> select_hard_cuda(const Tensor& scores, int64_t k) {
  const int32_t device = scores.get_device_index();
  const DeviceGuard guard(device);
  const Tensor scores_BN = with_contiguous_rows(scores);
  int64_t rows = scores_BN.size(0);
  const int64_t n = scores_BN.size(1);
  Tensor index_BK = torch::stable::new_empty(scores_BN, {rows, k}, ScalarType::Long);
  Tensor bounds_B2 = torch::stable::new_empty(scores_BN, {rows, 2});
  if (rows == 0) return {index_BK, bounds_B2};

  // As many blocks a row as have a tile each to work on, while one team for every row stays resident.
  const int64_t resident = resident_blocks(device), tiles = std::max<int64_t>(1, (n + kTile - 1) / kTile);
  uint32_t team_blocks = static_cast<uint32_t>(std::min(tiles, std::max<int64_t>(1, resident / rows)));
  const int64_t blocks = std::min(rows, resident / team_blocks) * team_blocks;

  const cudaStream_t stream = current_stream(scores_BN);
  const float* scores_ptr = static_cast<const float*>(scores_BN.const_data_ptr());
  int64_t stride = row_stride(scores_BN);
  uint32_t n_32 = static_cast<uint32_t>(n), k_32 = static_cast<uint32_t>(k);
  int64_t* index_ptr = static_cast<int64_t*>(index_BK.mutable_data_ptr());
  float* bounds_ptr = static_cast<float*>(bounds_B2.mutable_data_ptr());
  uint32_t* work_ptr = nullptr;
  Tensor work_BW = bounds_B2;  // replaced where a workspace is needed; it lives until the launch is queued
  if (team_blocks > 1) {
    work_BW = torch::stable::new_empty(scores_BN, {rows, select_work_words(team_blocks)}, ScalarType::Int);
    work_ptr = static_cast<uint32_t*>(work_BW.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(work_ptr, 0, work_BW.numel() * sizeof(uint32_t), stream));
  }
  void* arguments[] = {&scores_ptr, &stride, &rows, &n_32, &k_32, &team_blocks, &work_ptr, &index_ptr, &bounds_ptr};
  const auto kernel = reinterpret_cast<const void*>(select_hard_kernel);
  const dim3 grid(static_cast<unsigned>(blocks)), block(kSelectThreads);
  // Blocks of a team wait for each other, which only a cooperative launch allows.
  STD_CUDA_CHECK(
      team_blocks > 1 ? cudaLaunchCooperativeKernel(kernel, grid, block, arguments, 0, stream)
                      : cudaLaunchKernel(kernel, grid, block, arguments, 0, stream));
  return {index_BK, bounds_B2};
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("select_hard", TORCH_BOX(&cascade::select_hard_cuda));
}
