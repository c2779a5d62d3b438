// rotate_rows: rotary positions of each token's heads, put where attention wants them in the same pass; and back.
//
// Shape legend: K tokens, H heads, E head size, F = E / 2, P rows of E numbers.
#include "rows.h"
#include "scalars.h"

namespace cascade_fast {
namespace {

constexpr int64_t kTokensPerBlock = 32;

struct Rotated {  // x_KHE and rows_PE contiguous, cos_KF and sin_KF too
  void *x_KHE, *rows_PE;
  const float *cos_KF, *sin_KF;  // null: nothing is turned
  const int64_t* index_Y;        // H entries for each token
  int64_t heads, size;
  bool back;  // from rows to x, by the transposed rotation

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

template <class V, class T>
void Rotated::run(int64_t begin, int64_t end) const {
  const int64_t half = size / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t h = 0; h < heads; ++h) {
      T* x = static_cast<T*>(x_KHE) + (k * heads + h) * size;
      T* row = static_cast<T*>(rows_PE) + index_Y[k * heads + h] * size;
      const T* __restrict from = back ? row : x;
      T* __restrict to = back ? x : row;
      if (cos_KF == nullptr) {
        std::memcpy(static_cast<void*>(to), from, size * sizeof(T));
        continue;
      }
      const float* __restrict cos = cos_KF + k * half;
      const float* __restrict sin = sin_KF + k * half;
      for (int64_t i = 0; i < half; ++i) {
        const float a = widen(from[i]), b = widen(from[half + i]), s = sign * sin[i];
        narrow(a * cos[i] - b * s, to + i);
        narrow(b * cos[i] + a * s, to + half + i);
      }
    }
  }
}

void rotate(const Tensor& x_KHE, const Tensor& rows_PE, const Tensor& cos, const Tensor& sin, const Tensor& index,
            int64_t heads, bool back) {
  const Tensor cos_KF = torch::stable::contiguous(cos), sin_KF = torch::stable::contiguous(sin);
  const Tensor index_Y = torch::stable::contiguous(index);
  if (rows_PE.size(1) == 0) return;  // no memory at all
  const bool turned = cos.numel() > 0;
  const int64_t tokens = index.size(0) / heads;
  const Rotated body{x_KHE.data_ptr(), rows_PE.data_ptr(), turned ? cos_KF.const_data_ptr<float>() : nullptr,
                     turned ? sin_KF.const_data_ptr<float>() : nullptr, index_Y.const_data_ptr<int64_t>(), heads,
                     rows_PE.size(1), back};
  const auto run = run_for_this_cpu<Rotated>(rows_PE.scalar_type());
  parallel_blocks(tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

Tensor rotate_rows(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& index, const Tensor& into) {
  const int64_t heads = x.size(1), size = into.size(1), rows = into.size(0);
  const Tensor index_Y = torch::stable::contiguous(index), x_KHE = torch::stable::contiguous(x);
  check_index(index_Y.const_data_ptr<int64_t>(), 1, index.size(0), rows);
  const Tensor out_PE = torch::stable::new_empty(into, {rows, size});
  if (index.size(0) < rows) {  // else every row is written below: no index comes twice
    const RowView from(into), to(out_PE);
    parallel_blocks(rows, rows_per_block(rows, to.row_bytes() + 32), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) copy_row(to.row(i), from.row(i), from);
    });
  }
  rotate(x_KHE, out_PE, cos, sin, index_Y, heads, false);
  return out_PE;
}

Tensor rotate_rows_backward(
    const Tensor& grad, const Tensor& cos, const Tensor& sin, const Tensor& index, int64_t heads, int64_t tokens) {
  const Tensor grad_PE = torch::stable::contiguous(grad);
  const Tensor out_KHE = torch::stable::new_empty(grad_PE, {tokens, heads, grad.size(1)});
  const int64_t written = index.size(0) * grad.size(1) * static_cast<int64_t>(grad.element_size());
  const int64_t all = out_KHE.numel() * static_cast<int64_t>(grad.element_size());
  if (all > written) std::memset(static_cast<char*>(out_KHE.mutable_data_ptr()) + written, 0, all - written);
  rotate(out_KHE, grad_PE, cos, sin, index, heads, true);
  return out_KHE;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("rotate_rows", TORCH_BOX(&rotate_rows));
  m.impl("rotate_rows_backward", TORCH_BOX(&rotate_rows_backward));
}

}  // namespace cascade_fast
