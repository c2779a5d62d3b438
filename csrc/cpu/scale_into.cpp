// scale_into_: many small matrices, scaled and rounded into places of their own in others; one call for all of them.
#include "scalars.h"

namespace cascade_fast {
namespace {

struct Placed {
  const float* from;  // (N, D), contiguous
  void* to;
  int64_t n, d, row_stride;
};

struct AllPlaced {
  const std::vector<Placed>* matrices;
  float scale;

  template <class V, class T>
  CASCADE_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t m = begin; m < end; ++m) {
      const Placed& one = (*matrices)[m];
      for (int64_t i = 0; i < one.n; ++i) {
        const float* __restrict from = one.from + i * one.d;
        T* __restrict to = static_cast<T*>(one.to) + i * one.row_stride;
        for (int64_t j = 0; j < one.d; ++j) narrow(from[j] * scale, to + j);
      }
    }
  }
};

void scale_into_(std::vector<Tensor> into, std::vector<Tensor> from, double scale) {
  if (into.empty()) return;
  std::vector<Placed> matrices;
  for (size_t m = 0; m < into.size(); ++m) {
    matrices.push_back({from[m].const_data_ptr<float>(), into[m].mutable_data_ptr(), into[m].size(0), into[m].size(1),
                        into[m].stride(0)});
  }
  const AllPlaced body{&matrices, static_cast<float>(scale)};
  const auto run = run_for_this_cpu<AllPlaced>(into[0].scalar_type());
  parallel_blocks(static_cast<int64_t>(matrices.size()), 4, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("scale_into_", TORCH_BOX(&scale_into_)); }

}  // namespace cascade_fast
