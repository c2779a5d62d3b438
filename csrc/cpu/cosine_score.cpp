// cosine_score: <a, b> / (|a| |b| + 1e-8) per row in one pass over both arrays, accumulated in float32.
//
// Shape legend: N rows, D hidden size.
#include "vectors.h"

namespace cascade_fast {
namespace {

constexpr float kEps = 1e-8f;

template <class V>
struct Sums {
  typename V::Floats ab[2] = {}, aa[2] = {}, bb[2] = {};  // two of each: additions overlap
};

template <class V, class T>
CASCADE_INLINE void accumulate(const T* a_step, const T* b_step, Sums<V>& sums) {
  typename V::Floats a[2], b[2];
  load_pair<V>(a_step, a[0], a[1]);
  load_pair<V>(b_step, b[0], b[1]);
  for (int i = 0; i < 2; ++i) {
    sums.ab[i] += a[i] * b[i];
    sums.aa[i] += a[i] * a[i];
    sums.bb[i] += b[i] * b[i];
  }
}

template <class V, class T>
CASCADE_INLINE float score_row(const T* a_D, const T* b_D, int64_t d) {
  constexpr int kStep = V::kStep;
  Sums<V> sums;
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) accumulate<V>(a_D + i, b_D + i, sums);
  if (i < d) {  // the tail, filled up with zeros
    T tail_a[kStep] = {}, tail_b[kStep] = {};
    std::memcpy(static_cast<void*>(tail_a), a_D + i, (d - i) * sizeof(T));
    std::memcpy(static_cast<void*>(tail_b), b_D + i, (d - i) * sizeof(T));
    accumulate<V>(tail_a, tail_b, sums);
  }
  const typename V::Floats ab = sums.ab[0] + sums.ab[1], aa = sums.aa[0] + sums.aa[1], bb = sums.bb[0] + sums.bb[1];
  return sum<V>(ab) / (std::sqrt(sum<V>(aa)) * std::sqrt(sum<V>(bb)) + kEps);
}

struct ScoreRows {  // of two arrays whose rows are contiguous
  const void *a, *b;
  int64_t stride_a, stride_b, d;
  float* score_N;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      score_N[n] = score_row<V>(static_cast<const T*>(a) + n * stride_a, static_cast<const T*>(b) + n * stride_b, d);
    }
  }
};

Tensor with_contiguous_rows(const Tensor& t_ND) {
  return t_ND.size(1) <= 1 || t_ND.stride(1) == 1 ? t_ND : torch::stable::contiguous(t_ND);
}

Tensor cosine_score(const Tensor& h_in_ND, const Tensor& h_out_ND) {
  const Tensor a_ND = with_contiguous_rows(h_in_ND), b_ND = with_contiguous_rows(h_out_ND);
  const int64_t n = a_ND.size(0), d = a_ND.size(1);
  const Tensor score_N = torch::stable::new_empty(a_ND, {n}, ScalarType::Float);
  const ScoreRows rows{a_ND.const_data_ptr(), b_ND.const_data_ptr(), a_ND.stride(0), b_ND.stride(0), d,
                       score_N.mutable_data_ptr<float>()};
  const auto run = run_for_this_cpu<ScoreRows>(a_ND.scalar_type());
  const int64_t row_bytes = 2 * d * static_cast<int64_t>(a_ND.element_size());
  parallel_blocks(n, rows_per_block(n, row_bytes + 4),
                  [&](int64_t begin, int64_t end) { run(rows, begin, end); });
  return score_N;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("cosine_score", TORCH_BOX(&cosine_score)); }

}  // namespace cascade_fast
