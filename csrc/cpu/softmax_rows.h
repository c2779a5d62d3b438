// The softmax of attention scores with a mask added, in their place, and its gradient in the place of the weights'
// gradient. A row stays in the core's cache.
//
// Shape legend: B sequences, H heads, Q queries, S keys.
#pragma once

#include "exponential.h"

#include <limits>

namespace cascade_fast {
namespace {

constexpr int64_t kItemsPerBlock = 16 * 1024;

template <class V, class T>
CASCADE_INLINE void load_row(const T* row, int64_t i, int64_t count, float rest, typename V::Floats (&x)[2]) {
  if (count >= V::kStep) {
    load_pair<V>(row + i, x[0], x[1]);
    return;
  }
  T tail[V::kStep];
  for (int k = 0; k < V::kStep; ++k) tail[k] = static_cast<T>(rest);
  std::memcpy(static_cast<void*>(tail), row + i, count * sizeof(T));
  load_pair<V>(tail, x[0], x[1]);
}

template <class V, class T>
CASCADE_INLINE void store_row(T* row, int64_t i, int64_t count, const typename V::Floats (&x)[2]) {
  if (count >= V::kStep) {
    store_pair<V>(row + i, x[0], x[1]);
    return;
  }
  T tail[V::kStep];
  store_pair<V>(tail, x[0], x[1]);
  std::memcpy(static_cast<void*>(row + i), tail, count * sizeof(T));
}

struct Softmax {
  void* scores_BHQS;
  const void* mask_BQS;
  int64_t heads, queries, keys;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

template <class V, class T>
void Softmax::run(int64_t begin, int64_t end) const {
  using Floats = typename V::Floats;
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const int64_t keys = this->keys;
  for (int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(scores_BHQS) + r * keys;
    const T* mask = static_cast<const T*>(mask_BQS) + (r / (heads * queries) * queries + r % queries) * keys;
    Floats most[2] = {Floats{} + kNone, Floats{} + kNone}, x[2], m[2], total[2] = {};
    for (int64_t i = 0; i < keys; i += V::kStep) {
      load_row<V>(row, i, keys - i, kNone, x);
      load_row<V>(mask, i, keys - i, 0.0f, m);
      for (int half = 0; half < 2; ++half) {
        const Floats masked = x[half] + m[half];
        most[half] = masked > most[half] ? masked : most[half];
      }
    }
    const float largest = max<V>(most[0] > most[1] ? most[0] : most[1]);
    for (int64_t i = 0; i < keys; i += V::kStep) {
      load_row<V>(row, i, keys - i, kNone, x);
      load_row<V>(mask, i, keys - i, 0.0f, m);
      for (int half = 0; half < 2; ++half) {
        Floats e;
        exp_of_negative<V>(x[half] + m[half] - largest, e);
        total[half] += e;
      }
    }
    const float inverse = 1.0f / sum<V>(total[0] + total[1]);
    for (int64_t i = 0; i < keys; i += V::kStep) {
      load_row<V>(row, i, keys - i, kNone, x);
      load_row<V>(mask, i, keys - i, 0.0f, m);
      Floats e[2];
      for (int half = 0; half < 2; ++half) {
        exp_of_negative<V>(x[half] + m[half] - largest, e[half]);
        e[half] = e[half] * inverse;
      }
      store_row<V>(row, i, keys - i, e);
    }
  }
}

struct SoftmaxGrad {
  void* grad_RS;
  const void* weights_RS;
  int64_t keys;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const;
};

template <class V, class T>
void SoftmaxGrad::run(int64_t begin, int64_t end) const {
  using Floats = typename V::Floats;
  const int64_t keys = this->keys;
  for (int64_t r = begin; r < end; ++r) {
    T* grad = static_cast<T*>(grad_RS) + r * keys;
    const T* weights = static_cast<const T*>(weights_RS) + r * keys;
    Floats g[2], w[2], total[2] = {};
    for (int64_t i = 0; i < keys; i += V::kStep) {
      load_row<V>(grad, i, keys - i, 0.0f, g);
      load_row<V>(weights, i, keys - i, 0.0f, w);
      for (int half = 0; half < 2; ++half) total[half] += g[half] * w[half];
    }
    const float mean = sum<V>(total[0] + total[1]);
    for (int64_t i = 0; i < keys; i += V::kStep) {
      load_row<V>(grad, i, keys - i, 0.0f, g);
      load_row<V>(weights, i, keys - i, 0.0f, w);
      for (int half = 0; half < 2; ++half) g[half] = w[half] * (g[half] - mean);
      store_row<V>(grad, i, keys - i, g);
    }
  }
}

// `scores` has H * Q rows a sequence, `mask` Q.
void masked_softmax(const Tensor& scores, const Tensor& mask_B1QS) {
  const int64_t keys = mask_B1QS.size(3), queries = mask_B1QS.size(2);
  const int64_t rows = keys == 0 ? 0 : scores.numel() / keys, masked = mask_B1QS.size(0) * queries;
  const int64_t heads = masked == 0 ? 0 : rows / masked;
  const Softmax body{scores.mutable_data_ptr(), mask_B1QS.const_data_ptr(), heads, queries, keys};
  const auto run = run_for_this_cpu<Softmax>(scores.scalar_type());
  parallel_blocks(rows, std::max<int64_t>(1, kItemsPerBlock / std::max<int64_t>(keys, 1)),
                  [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

void softmax_backward(const Tensor& grad, const Tensor& weights) {
  const int64_t keys = grad.size(-1), rows = keys == 0 ? 0 : grad.numel() / keys;
  const SoftmaxGrad body{grad.mutable_data_ptr(), weights.const_data_ptr(), keys};
  const auto run = run_for_this_cpu<SoftmaxGrad>(grad.scalar_type());
  parallel_blocks(rows, std::max<int64_t>(1, kItemsPerBlock / std::max<int64_t>(keys, 1)),
                  [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

}  // namespace
}  // namespace cascade_fast
