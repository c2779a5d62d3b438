// Launchers of rotate_rows and its gradient: one kernel where every row is replaced, and for the gradient.
#include "rotate_rows.cuh"

#include <algorithm>

#include "launch.cuh"

namespace cascade {

constexpr int64_t kLaunchBytes = 1 << 20;  // what a T4 moves in the time of a launch, about 4 us

// Tokens' heads, contiguous but for the stride between tokens.
struct Heads {
  Tensor x_KHE;
  int64_t stride;
  explicit Heads(const Tensor& x) : x_KHE(x), stride(x.size(0) > 1 ? x.stride(0) : x.size(1) * x.size(2)) {}
};

inline Heads with_contiguous_heads(const Tensor& x) {
  const bool in_place = x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2));
  return Heads(in_place ? x : torch::stable::contiguous(x));
}

// One launch: heads that are turned (x and rows given), rows of `into` that are copied, or both.
template <bool kBack>
void launch_rotate_rows(const Heads& x, const Tensor& rows_PE, const Tensor& cos, const Tensor& sin,
                        const Tensor& index_Y, const Tensor* into, const int32_t* slot_P, bool turn) {
  const int64_t tokens = x.x_KHE.size(0), heads = x.x_KHE.size(1), size = rows_PE.size(1), rows = rows_PE.size(0);
  const int64_t placed = index_Y.size(0) / heads, width = rows_PE.element_size();
  const bool turned = cos.numel() > 0;
  STD_TORCH_CHECK(size <= kMaxAngles, "cascade_fast: heads of ", size, " numbers are too long, at most ", kMaxAngles);
  bool wide = size / 2 * width % 16 == 0 && x.stride * width % 16 == 0;
  for (const Tensor* tensor : {&x.x_KHE, &rows_PE}) {
    wide = wide && reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0;
  }
  if (into != nullptr) wide = wide && rows_aligned({into});
  for_dtype(rows_PE.scalar_type(), [&]<class T>() {
    using Bits = typename T::Bits;
    const auto launch = [&]<int kBytes>() {
      const int64_t words = size / 2 / Elements<T, kBytes>::kCount, angles = turned ? size : 0;
      RotatedRows<T> all{};
      all.x_KHE = static_cast<Bits*>(const_cast<void*>(x.x_KHE.const_data_ptr()));
      all.rows_PE = static_cast<Bits*>(const_cast<void*>(rows_PE.const_data_ptr()));
      if (turned) {
        all.cos_KF = static_cast<const float*>(cos.const_data_ptr());
        all.sin_KF = static_cast<const float*>(sin.const_data_ptr());
      }
      all.index_Y = static_cast<const int64_t*>(index_Y.const_data_ptr());
      all.x_stride = x.stride, all.tokens = tokens, all.placed = placed, all.rows = rows;
      all.heads = static_cast<int>(heads), all.half = static_cast<int>(size / 2);
      all.block_rows = static_cast<int>(std::max<int64_t>(1, kRotateThreads / words));
      all.block_tokens = static_cast<int>(std::max<int64_t>(1, kRotateThreads / (heads * words)));
      if (turned) all.block_tokens = std::min<int>(all.block_tokens, static_cast<int>(kMaxAngles / size));
      if (turn) all.turn_blocks = blocks_for(kBack ? tokens : placed, all.block_tokens);
      int64_t blocks = all.turn_blocks;
      if (into != nullptr) {
        all.into_PE = static_cast<const Bits*>(into->const_data_ptr());
        all.into_stride = row_stride(*into), all.slot_P = slot_P;
        blocks += blocks_for(rows, all.block_rows);
      }
      const size_t shared = static_cast<size_t>(all.block_tokens) * angles * sizeof(float);
      if (blocks == 0) return;
      rotate_rows_kernel<T, kBytes, kBack>
          <<<blocks_for(blocks, 1), kRotateThreads, shared, current_stream(rows_PE)>>>(all);
    };
    if (wide) return launch.template operator()<16>();
    launch.template operator()<static_cast<int>(sizeof(Bits))>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor rotate_rows_cuda(
    const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& index, const Tensor& into) {
  const DeviceGuard guard(into.get_device_index());
  const int64_t rows = into.size(0), size = into.size(1), placed = index.size(0);
  const Tensor out_PE = torch::stable::new_empty(into, {rows, size});
  if (rows == 0 || size == 0) return out_PE;
  const Heads heads = with_contiguous_heads(x);
  const Tensor cos_KF = torch::stable::contiguous(cos), sin_KF = torch::stable::contiguous(sin);
  const Tensor index_Y = torch::stable::contiguous(index);
  const auto launch = [&](const Tensor* kept, const int32_t* slot_P, bool turn) {
    launch_rotate_rows<false>(heads, out_PE, cos_KF, sin_KF, index_Y, kept, slot_P, turn);
  };
  if (placed == rows) {  // no index comes twice: nothing of `into` is kept
    launch(nullptr, nullptr, true);
    return out_PE;
  }
  const Tensor into_PE = with_contiguous_rows(into);
  // Few rows: all of `into` is copied and they are written over it. Many: first is found out which rows are replaced, a
  // launch more.
  if (2 * placed * size * static_cast<int64_t>(into.element_size()) <= kLaunchBytes) {
    launch(&into_PE, nullptr, false);
    launch(nullptr, nullptr, true);
    return out_PE;
  }
  const Tensor slot_P = inverse_of(index_Y, rows);
  launch(&into_PE, static_cast<const int32_t*>(slot_P.const_data_ptr()), true);
  return out_PE;
}

Tensor rotate_rows_backward_cuda(
    const Tensor& grad, const Tensor& cos, const Tensor& sin, const Tensor& index, int64_t heads, int64_t tokens) {
  const DeviceGuard guard(grad.get_device_index());
  const Tensor grad_PE = torch::stable::contiguous(grad);
  const Tensor out_KHE = torch::stable::new_empty(grad_PE, {tokens, heads, grad.size(1)});
  if (out_KHE.numel() == 0) return out_KHE;
  const Tensor cos_KF = torch::stable::contiguous(cos), sin_KF = torch::stable::contiguous(sin);
  const Tensor index_Y = torch::stable::contiguous(index);
  launch_rotate_rows<true>(Heads(out_KHE), grad_PE, cos_KF, sin_KF, index_Y, nullptr, nullptr, true);
  return out_KHE;
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("rotate_rows", TORCH_BOX(&cascade::rotate_rows_cuda));
  m.impl("rotate_rows_backward", TORCH_BOX(&cascade::rotate_rows_backward_cuda));
}
