// What low_rank_backward computes, for its two bodies.
//
// Shape legend: K tokens, D inputs, F outputs of a layer, R ranks of all layers of the same inputs, C = D + R.
#pragma once

#include "common.h"

namespace cascade_fast {
namespace {

struct WeightGrad {  // out = scale * low^T values
  const void* values_KF;
  int64_t stride, f;
  const void* low_KR;  // R of this gradient; rows are C apart
  int64_t r;
  float* out;
  float scale;
  bool by_column;  // out is (F, R), else (R, F)

  float& at(int64_t rank, int64_t column) const { return out[by_column ? column * r + rank : rank * f + column]; }
};

struct LowRankGrads {
  const void* grad_KC;
  const void* low_grad_KR;  // the last columns of grad
  const void* a_RD;
  void* grad_x_KD;  // grad + low_grad A
  std::vector<WeightGrad> weights;
  int64_t k, d, r;

  int64_t c() const { return d + r; }
};

constexpr int64_t kColumns = 32;  // of a gradient of weights that make a task

int64_t column_tasks(const std::vector<WeightGrad>& weights) {
  int64_t tasks = 0;
  for (const WeightGrad& one : weights) tasks += ceil_div(one.f, kColumns);
  return tasks;
}

// Which gradient of weights a task works on, and its first column.
std::pair<size_t, int64_t> column_task(const std::vector<WeightGrad>& weights, int64_t task) {
  size_t m = 0;
  for (; task >= ceil_div(weights[m].f, kColumns); ++m) task -= ceil_div(weights[m].f, kColumns);
  return {m, task * kColumns};
}

}  // namespace
}  // namespace cascade_fast
