// gather_rows: rows of hidden states, and the same entries of the small arrays that travel with them, in one pass.
//
// Shape legend: N rows, D hidden size, K gathered rows.
#include "rows.h"

namespace cascade_fast {

namespace {

// An (N,) array of any dtype and its (K,) output.
struct Carried {
  const char* from;
  char* to;
  int64_t stride;  // bytes
  int64_t item;    // bytes
};

template <class Item>
void gather_items(const Carried& array, const int64_t* index_K, int64_t index_stride, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    std::memcpy(array.to + k * sizeof(Item), array.from + index_K[k * index_stride] * array.stride, sizeof(Item));
  }
}

struct Bytes16 {
  uint64_t word[2];
};

void gather_items(const Carried& array, const int64_t* index_K, int64_t index_stride, int64_t begin, int64_t end) {
  switch (array.item) {
    case 1: return gather_items<uint8_t>(array, index_K, index_stride, begin, end);
    case 2: return gather_items<uint16_t>(array, index_K, index_stride, begin, end);
    case 4: return gather_items<uint32_t>(array, index_K, index_stride, begin, end);
    case 8: return gather_items<uint64_t>(array, index_K, index_stride, begin, end);
    default: return gather_items<Bytes16>(array, index_K, index_stride, begin, end);  // complex128, the widest dtype
  }
}

std::tuple<Tensor, std::vector<Tensor>> gather_rows(
    const Tensor& hidden_ND, const Tensor& index_K, const std::vector<Tensor>& carried) {
  const int64_t n = hidden_ND.size(0), d = hidden_ND.size(1), count = index_K.size(0);
  const int64_t* index = index_K.const_data_ptr<int64_t>();
  const int64_t index_stride = index_K.stride(0);
  check_index(index, index_stride, count, n);

  const Tensor hidden_KD = torch::stable::new_empty(hidden_ND, {count, d});
  advise_huge_pages(hidden_KD);
  std::vector<Tensor> gathered;
  std::vector<Carried> arrays;
  for (const Tensor& array_N : carried) {
    const auto item = static_cast<int64_t>(array_N.element_size());
    gathered.push_back(torch::stable::new_empty(array_N, {count}));
    arrays.push_back({static_cast<const char*>(array_N.const_data_ptr()),
                      static_cast<char*>(gathered.back().mutable_data_ptr()), array_N.stride(0) * item, item});
  }

  const RowView from(hidden_ND), to(hidden_KD);
  parallel_blocks(count, rows_per_block(count, from.row_bytes() + 32), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) copy_row(to.row(k), from.row(index[k * index_stride]), from);
    for (const Carried& array : arrays) gather_items(array, index, index_stride, begin, end);
  });
  return {hidden_KD, gathered};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }

}  // namespace cascade_fast
