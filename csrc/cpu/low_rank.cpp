// low_rank and its gradients: the narrow products of LoRA updates, which libraries of large products run at a fraction
// of their rate. Float32 sums, in an order that does not depend on the number of threads: by vectors, or in bfloat16
// where there is AMX by tiles.
//
// Shape legend: K tokens, D inputs, F outputs of a layer, R ranks of all layers, P = R rounded up to kPadded (zeros),
// C = D + R.
#include "low_rank_tiles.h"
#include "scalars.h"
#include "vectors.h"

#include <cstring>

namespace cascade_fast {
namespace {

constexpr int64_t kPadded = 16;          // a whole number of vectors of every instruction set
constexpr int64_t kTokensPerTask = 32;
static_assert(kColumns % 32 == 0, "a whole number of pairs of vectors");
constexpr int64_t kChunk = 64;           // inputs whose float32 copy stays in the first cache

int64_t padded(int64_t ranks) { return ceil_div(ranks, kPadded) * kPadded; }

// How many accumulators of two vectors stay in registers: there are 32 with AVX-512, 16 without.
template <class V>
constexpr int kAtOnce = V::kLanes == 16 ? 8 : 4;

// A pair of vectors from the next `count` columns of a row, or as many as there is room for; zeros after them.
template <class V, class T>
CASCADE_INLINE void load_columns(const T* p, int64_t count, typename V::Floats& x, typename V::Floats& y) {
  if (count >= V::kStep) {
    load_pair<V>(p, x, y);
  } else {
    T tail[V::kStep] = {};
    std::memcpy(static_cast<void*>(tail), p, count * sizeof(T));
    load_pair<V>(tail, x, y);
  }
}

template <class V, class T>
CASCADE_INLINE void store_columns(T* p, int64_t count, const typename V::Floats& x, const typename V::Floats& y) {
  if (count >= V::kStep) {
    store_pair<V>(p, x, y);
  } else {
    T tail[V::kStep];
    store_pair<V>(tail, x, y);
    std::memcpy(static_cast<void*>(p), tail, count * sizeof(T));
  }
}

// (N, R) with rows `stride` apart as float32 (N, P).
std::vector<float> widened(const void* from, ScalarType dtype, int64_t stride, int64_t n, int64_t r) {
  std::vector<float> to(n * padded(r));
  for_dtype(dtype, [&]<class T>() {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < r; ++j) to[i * padded(r) + j] = widen(static_cast<const T*>(from)[i * stride + j]);
    }
  });
  return to;
}

// --- low_rank --------------------------------------------------------------------------------------------------------

struct LowRank {
  const void* x_KD;
  int64_t x_stride;
  const float* a_DP;  // A, transposed
  void* both_KC;
  int64_t d, r, p;

  template <class V, class T, int Rows>
  CASCADE_INLINE void rows(int64_t first, float* sum_RowsP) const {
    using Floats = typename V::Floats;
    const int64_t c = d + r;
    alignas(64) float x[Rows * kChunk];
    std::fill(sum_RowsP, sum_RowsP + Rows * p, 0.0f);
    for (int64_t start = 0; start < d; start += kChunk) {
      const int64_t count = std::min(kChunk, d - start);
      for (int i = 0; i < Rows; ++i) {
        const T* __restrict from = static_cast<const T*>(x_KD) + (first + i) * x_stride + start;
        std::memcpy(static_cast<void*>(static_cast<T*>(both_KC) + (first + i) * c + start), from, count * sizeof(T));
        for (int64_t j = 0; j < count; ++j) x[i * kChunk + j] = widen(from[j]);
      }
      for (int64_t g = 0; g < p; g += V::kLanes) {
        Floats sum[Rows];
        for (int i = 0; i < Rows; ++i) load<V>(sum_RowsP + i * p + g, sum[i]);
        for (int64_t j = 0; j < count; ++j) {
          Floats a;
          load<V>(a_DP + (start + j) * p + g, a);
          for (int i = 0; i < Rows; ++i) sum[i] += a * x[i * kChunk + j];
        }
        for (int i = 0; i < Rows; ++i) store<V>(sum_RowsP + i * p + g, sum[i]);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      T* low = static_cast<T*>(both_KC) + (first + i) * c + d;
      for (int64_t j = 0; j < r; ++j) narrow(sum_RowsP[i * p + j], low + j);
    }
  }

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int kRows = 2 * kAtOnce<V>;
    std::vector<float> sum(kRows * p);
    for (; begin + kRows <= end; begin += kRows) rows<V, T, kRows>(begin, sum.data());
    for (; begin < end; ++begin) rows<V, T, 1>(begin, sum.data());
  }
};

Tensor low_rank(const Tensor& x, const Tensor& a) {
  const Tensor x_KD = x.stride(1) == 1 ? x : torch::stable::contiguous(x), a_RD = torch::stable::contiguous(a);
  const int64_t k = x.size(0), d = x.size(1), r = a.size(0);
  const Tensor both_KC = torch::stable::new_empty(x_KD, {k, d + r});
  if (fits_tiles(x.scalar_type(), d)) {
    low_rank_by_tiles(x_KD, a_RD, both_KC);
    return both_KC;
  }
  const std::vector<float> a_RD_wide = widened(a_RD.const_data_ptr(), a.scalar_type(), d, r, d);
  std::vector<float> a_DP(d * padded(r));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < d; ++j) a_DP[j * padded(r) + i] = a_RD_wide[i * padded(d) + j];
  }
  const LowRank body{x_KD.const_data_ptr(), x_KD.stride(0), a_DP.data(), both_KC.mutable_data_ptr(), d, r, padded(r)};
  const auto run = run_for_this_cpu<LowRank>(x.scalar_type());
  parallel_blocks(k, kTokensPerTask, [&](int64_t begin, int64_t end) { run(body, begin, end); });
  return both_KC;
}

// --- low_rank_backward -----------------------------------------------------------------------------------------------

struct LowRankBackward {
  const LowRankGrads* of;
  std::vector<float> low_grad_KP;
  std::vector<std::vector<float>> low_KP;  // of each gradient of weights

  int64_t token_tasks() const { return ceil_div(of->k, kTokensPerTask); }

  // grad_x of the tokens [first, first + Rows).
  template <class V, class T, int Rows>
  CASCADE_INLINE void tokens(int64_t first) const {
    using Floats = typename V::Floats;
    const int64_t c = of->c(), d = of->d, p = padded(of->r);
    const T* grad = static_cast<const T*>(of->grad_KC) + first * c;
    for (int64_t j = 0; j < d; j += V::kStep) {
      Floats x[Rows], y[Rows];
      for (int i = 0; i < Rows; ++i) load_columns<V>(grad + i * c + j, d - j, x[i], y[i]);
      for (int64_t rank = 0; rank < of->r; ++rank) {
        Floats a_x, a_y;
        load_columns<V>(static_cast<const T*>(of->a_RD) + rank * d + j, d - j, a_x, a_y);
        const float* low_grad = low_grad_KP.data() + first * p + rank;
        for (int i = 0; i < Rows; ++i) {
          x[i] += a_x * low_grad[i * p];
          y[i] += a_y * low_grad[i * p];
        }
      }
      for (int i = 0; i < Rows; ++i) {
        store_columns<V>(static_cast<T*>(of->grad_x_KD) + (first + i) * d + j, d - j, x[i], y[i]);
      }
    }
  }

  // Columns [first, first + V::kStep) of a gradient of weights.
  template <class V, class T>
  CASCADE_INLINE void columns(const WeightGrad& grad, const float* low_KP, int64_t first) const {
    using Floats = typename V::Floats;
    constexpr int kRanks = kAtOnce<V>;
    const int64_t count = std::min<int64_t>(V::kStep, grad.f - first);
    for (int64_t rank = 0; rank < grad.r; rank += kRanks) {
      Floats x[kRanks] = {}, y[kRanks] = {};
      for (int64_t token = 0; token < of->k; ++token) {
        Floats value_x, value_y;
        load_columns<V>(static_cast<const T*>(grad.values_KF) + token * grad.stride + first, count, value_x, value_y);
        const float* low = low_KP + token * padded(grad.r) + rank;
        for (int i = 0; i < kRanks; ++i) {
          x[i] += value_x * low[i];
          y[i] += value_y * low[i];
        }
      }
      for (int64_t i = 0; i < std::min<int64_t>(kRanks, grad.r - rank); ++i) {
        float lane[2][V::kLanes];
        store<V>(lane[0], x[i] * grad.scale);
        store<V>(lane[1], y[i] * grad.scale);
        for (int64_t j = 0; j < count; ++j) {  // in the order of load_pair
          grad.at(rank + i, first + j) = sizeof(T) == 4 ? lane[j / V::kLanes][j % V::kLanes] : lane[j % 2][j / 2];
        }
      }
    }
  }

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      if (task < token_tasks()) {
        int64_t token = task * kTokensPerTask;
        const int64_t last = std::min(of->k, token + kTokensPerTask);
        for (; token + kAtOnce<V> <= last; token += kAtOnce<V>) tokens<V, T, kAtOnce<V>>(token);
        for (; token < last; ++token) tokens<V, T, 1>(token);
        continue;
      }
      const auto [m, first] = column_task(of->weights, task - token_tasks());
      const WeightGrad& grad = of->weights[m];
      const int64_t last = std::min(grad.f, first + kColumns);
      for (int64_t j = first; j < last; j += V::kStep) columns<V, T>(grad, low_KP[m].data(), j);
    }
  }
};

void run_by_vectors(const LowRankGrads& of, ScalarType dtype) {
  LowRankBackward body{&of, widened(of.low_grad_KR, dtype, of.c(), of.k, of.r), {}};
  for (const WeightGrad& grad : of.weights) body.low_KP.push_back(widened(grad.low_KR, dtype, of.c(), of.k, grad.r));
  const auto run = run_for_this_cpu<LowRankBackward>(dtype);
  const int64_t tasks = body.token_tasks() + column_tasks(of.weights);
  parallel_blocks(tasks, 1, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> low_rank_backward(
    const Tensor& grad, const Tensor& both, const Tensor& a, std::vector<Tensor> grads, std::vector<int64_t> ranks,
    double scale) {
  const Tensor grad_KC = torch::stable::contiguous(grad), both_KC = torch::stable::contiguous(both);
  const Tensor a_RD = torch::stable::contiguous(a);
  const int64_t k = both.size(0), r = a.size(0), d = a.size(1), c = d + r;
  const auto size = static_cast<int64_t>(both.element_size());
  const char* low = static_cast<const char*>(both_KC.const_data_ptr()) + d * size;
  const char* low_grad = static_cast<const char*>(grad_KC.const_data_ptr()) + d * size;
  const Tensor grad_x_KD = torch::stable::new_empty(both_KC, {k, d});
  const Tensor grad_a_RD = torch::stable::new_empty(both_KC, {r, d}, ScalarType::Float);
  LowRankGrads of{grad_KC.const_data_ptr(), low_grad, a_RD.const_data_ptr(), grad_x_KD.mutable_data_ptr(), {}, k, d, r};
  of.weights.push_back({both_KC.const_data_ptr(), c, d, low_grad, r, grad_a_RD.mutable_data_ptr<float>(),
                        static_cast<float>(scale), false});
  std::vector<Tensor> kept, grads_b;
  for (size_t i = 0; i < grads.size(); ++i) {
    kept.push_back(torch::stable::contiguous(grads[i]));
    const int64_t f = grads[i].size(1);
    grads_b.push_back(torch::stable::new_empty(both_KC, {f, ranks[i]}, ScalarType::Float));
    of.weights.push_back({kept[i].const_data_ptr(), f, f, low, ranks[i], grads_b[i].mutable_data_ptr<float>(), 1.0f,
                          true});
    low += ranks[i] * size;
  }
  if (fits_tiles(of, both.scalar_type())) {
    run_by_tiles(of);
  } else {
    run_by_vectors(of, both.scalar_type());
  }
  return {grad_x_KD, grad_a_RD, grads_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&low_rank));
  m.impl("low_rank_backward", TORCH_BOX(&low_rank_backward));
}

}  // namespace cascade_fast
