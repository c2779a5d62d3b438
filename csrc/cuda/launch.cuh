// What every launcher needs of torch: the stream, the device, and rows whose last dimension is contiguous. The callers
// have checked shapes, dtypes and devices (cascade_fast/ops/schema.py); launchers only compute addresses and grids.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "lists.cuh"
#include "numeric.cuh"

namespace cascade {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t blocks_for(int64_t items, int64_t items_a_block) {
  const int64_t blocks = (items + items_a_block - 1) / items_a_block;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "cascade_fast: ", items, " rows need more blocks than a grid has");
  return blocks;
}

// The tensor itself when its rows can be read in place (any row stride, 0 too), else a contiguous copy.
inline Tensor with_contiguous_rows(const Tensor& matrix) {
  const bool in_place = matrix.stride(1) == 1 || matrix.size(1) <= 1;
  return in_place ? matrix : torch::stable::contiguous(matrix);
}

// The stride of the rows; a matrix of one row may carry any number there.
inline int64_t row_stride(const Tensor& matrix) { return matrix.size(0) > 1 ? matrix.stride(0) : matrix.size(1); }

inline int row_elements(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.size(1) <= INT32_MAX / 2, "cascade_fast: rows of ", matrix.size(1), " elements are too long");
  return static_cast<int>(matrix.size(1));
}

// Whether every row of every matrix starts on 16 bytes.
inline bool rows_aligned(std::initializer_list<const Tensor*> matrices) {
  for (const Tensor* matrix : matrices) {
    const auto address = reinterpret_cast<uintptr_t>(matrix->const_data_ptr());
    if (address % 16 != 0 || row_stride(*matrix) * static_cast<int64_t>(matrix->element_size()) % 16 != 0) return false;
  }
  return true;
}

// slot_N: where in index_K (contiguous) a row is, -1 where it is not. A memset and a kernel, in scatter_rows.cu.
Tensor inverse_of(const Tensor& index_K, int64_t rows);

inline ElementKind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kFloat32Elements;
    case ScalarType::Half: return kFloat16Elements;
    case ScalarType::BFloat16: return kBFloat16Elements;
    default: STD_TORCH_CHECK(false, "cascade_fast: the dtype must be float32, float16 or bfloat16");
  }
}

// Calls run.template operator()<T>() with the element type of `dtype`.
template <class Run>
void for_dtype(ScalarType dtype, Run run) {
  switch (kind_of(dtype)) {
    case kFloat32Elements: return run.template operator()<Float32>();
    case kFloat16Elements: return run.template operator()<Float16>();
    default: return run.template operator()<BFloat16>();
  }
}

}  // namespace cascade
