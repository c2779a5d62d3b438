// scatter_rows: a copy of `into` with some rows replaced, or increased. Every output row is written exactly once: an
// inverse index says which input it comes from.
//
// Shape legend: N rows, D hidden size, K rows put back.
#include "rows.h"

namespace cascade_fast {
namespace {

// Sum in float32, rounded once.
template <class T>
void add_row_of(char* to, const char* into, int64_t into_stride, const char* row, int64_t row_stride, int64_t d) {
  for (int64_t i = 0; i < d; ++i) {
    T a, b;
    std::memcpy(static_cast<void*>(&a), into + i * into_stride, sizeof(T));
    std::memcpy(static_cast<void*>(&b), row + i * row_stride, sizeof(T));
    const T sum = static_cast<T>(static_cast<float>(a) + static_cast<float>(b));
    std::memcpy(to + i * sizeof(T), static_cast<const void*>(&sum), sizeof(T));
  }
}

Tensor scatter_rows(const Tensor& rows_KD, const Tensor& index_K, const Tensor& into_ND, bool add) {
  const int64_t n = into_ND.size(0), d = into_ND.size(1), count = index_K.size(0);
  const int64_t* index = index_K.const_data_ptr<int64_t>();
  const int64_t index_stride = index_K.stride(0);
  check_index(index, index_stride, count, n);

  const Tensor out_ND = torch::stable::new_empty(into_ND, {n, d});
  advise_huge_pages(out_ND);
  std::vector<int64_t> source_N(n, -1);  // which of rows_KD an output row comes from; -1: from into_ND
  for (int64_t k = 0; k < count; ++k) source_N[index[k * index_stride]] = k;

  const RowView rows(rows_KD), into(into_ND), out(out_ND);
  const auto add_row = for_dtype(into_ND.scalar_type(), []<class T>() { return &add_row_of<T>; });
  parallel_blocks(n, rows_per_block(n, out.row_bytes() + 32), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = source_N[i];
      if (k < 0) {
        copy_row(out.row(i), into.row(i), into);
      } else if (add) {
        add_row(out.row(i), into.row(i), into.item_stride, rows.row(k), rows.item_stride, d);
      } else {
        copy_row(out.row(i), rows.row(k), rows);
      }
    }
  });
  return out_ND;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("scatter_rows", TORCH_BOX(&scatter_rows)); }

}  // namespace cascade_fast
