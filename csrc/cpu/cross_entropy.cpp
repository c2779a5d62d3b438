// cross_entropy_: loss and entropy of every row of logits and, if asked, their gradient in their place.
//
// A row (96 KB for 49,152 bfloat16 logits) stays in the core's cache while it is read for its maximum, read for its sums
// and, for the gradient, read and written: memory sees each logit once.
//
// Shape legend: C tokens, V vocabulary.
#include "exponential.h"

#include <limits>

namespace cascade_fast {
namespace {

template <class V>
struct Sums {  // of e^d and of d e^d, where d is a logit less the row's largest
  typename V::Floats e = {}, de = {};
};

template <class V>
CASCADE_INLINE void accumulate(const typename V::Floats& d, Sums<V>& sums) {
  using Floats = typename V::Floats;
  using Bits = typename V::Bits;
  Floats e;
  exp_of_negative<V>(d, e);
  sums.e += e;
  sums.de += (Floats)((Bits)d & ~(Bits)(d < kLeast)) * e;  // not -inf * 0
}

struct Logits {  // (C, V), contiguous
  void* data;
  int64_t v;
  const int64_t* labels_C;
  int64_t labels_stride;
  float* loss_C;
  float* entropy_C;
  bool grad;
  float scale;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

// What a row's tail is filled up with: adds nothing to a sum of exponentials.
template <class T>
CASCADE_INLINE void fill(T* tail, int count) {
  for (int i = 0; i < count; ++i) tail[i] = static_cast<T>(-std::numeric_limits<float>::infinity());
}

template <class V, class T>
CASCADE_INLINE void one_row(T* row_V, const Logits& all, int64_t c) {
  using Floats = typename V::Floats;
  constexpr int kStep = V::kStep;
  const int64_t whole = all.v / kStep * kStep, rest = all.v - whole;
  T tail[kStep];
  fill(tail, kStep);
  std::memcpy(static_cast<void*>(tail), row_V + whole, rest * sizeof(T));

  Floats x, y, most_x, most_y, e_x, e_y;
  load_pair<V>(tail, most_x, most_y);
  for (int64_t i = 0; i < whole; i += kStep) {
    load_pair<V>(row_V + i, x, y);
    most_x = x > most_x ? x : most_x;
    most_y = y > most_y ? y : most_y;
  }
  const float most = max<V>(most_x > most_y ? most_x : most_y);

  Sums<V> sums_x, sums_y;
  for (int64_t i = 0; i < whole; i += kStep) {
    load_pair<V>(row_V + i, x, y);
    accumulate<V>(x - most, sums_x);
    accumulate<V>(y - most, sums_y);
  }
  if (rest > 0) {
    load_pair<V>(tail, x, y);
    accumulate<V>(x - most, sums_x);
    accumulate<V>(y - most, sums_y);
  }
  const float s = sum<V>(sums_x.e + sums_y.e), t = sum<V>(sums_x.de + sums_y.de), log_s = std::log(s);
  const int64_t label = all.labels_C[c * all.labels_stride];
  all.loss_C[c] = log_s - (static_cast<float>(row_V[label]) - most);
  all.entropy_C[c] = log_s - t / s;
  if (!all.grad) return;

  const float factor = all.scale / s;
  const T label_grad = static_cast<T>(std::exp(static_cast<float>(row_V[label]) - most) * factor - all.scale);
  for (int64_t i = 0; i < whole; i += kStep) {
    load_pair<V>(row_V + i, x, y);
    exp_of_negative<V>(x - most, e_x);
    exp_of_negative<V>(y - most, e_y);
    store_pair<V>(row_V + i, e_x * factor, e_y * factor);
  }
  if (rest > 0) {
    load_pair<V>(tail, x, y);
    exp_of_negative<V>(x - most, e_x);
    exp_of_negative<V>(y - most, e_y);
    store_pair<V>(tail, e_x * factor, e_y * factor);
    std::memcpy(static_cast<void*>(row_V + whole), tail, rest * sizeof(T));
  }
  row_V[label] = label_grad;
}

template <class V, class T>
void Logits::run(int64_t begin, int64_t end) const {
  for (int64_t c = begin; c < end; ++c) one_row<V>(static_cast<T*>(data) + c * v, *this, c);
}

std::tuple<Tensor, Tensor> cross_entropy_(const Tensor& logits_CV, const Tensor& labels_C, bool grad, double scale) {
  const int64_t c = logits_CV.size(0), v = logits_CV.size(1);
  const int64_t* labels = labels_C.const_data_ptr<int64_t>();
  const int64_t labels_stride = labels_C.stride(0);
  for (int64_t i = 0; i < c; ++i) {
    const int64_t label = labels[i * labels_stride];
    if (label < 0 || label >= v) {
      throw std::out_of_range("labels: entry " + std::to_string(i) + " is " + std::to_string(label) +
                              "; must be in [0, " + std::to_string(v) + ")");
    }
  }
  const Tensor loss_C = torch::stable::new_empty(logits_CV, {c}, ScalarType::Float);
  const Tensor entropy_C = torch::stable::new_empty(logits_CV, {c}, ScalarType::Float);
  const Logits all{logits_CV.mutable_data_ptr(), v, labels, labels_stride, loss_C.mutable_data_ptr<float>(),
                   entropy_C.mutable_data_ptr<float>(), grad, static_cast<float>(scale)};
  const auto run = run_for_this_cpu<Logits>(logits_CV.scalar_type());
  const int64_t row_bytes = v * static_cast<int64_t>(logits_CV.element_size());
  parallel_blocks(c, rows_per_block(c, row_bytes + 16), [&](int64_t begin, int64_t end) { run(all, begin, end); });
  return {loss_C, entropy_C};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }

}  // namespace cascade_fast
