// attention: softmax(query key^T + mask) value for grouped heads, and its gradients: in bfloat16 by tiles where the
// processor has them, else torch's products with one pass for the softmax between them.
#include "attention_tiles.h"
#include "softmax_rows.h"

namespace cascade_fast {
namespace {

#if CASCADE_AMX
bool fits_tiles(const Tensor& query_NRE) {
  return query_NRE.scalar_type() == ScalarType::BFloat16 && query_NRE.size(2) % kTileColumns == 0 && cpu_has_amx();
}
#endif

constexpr int64_t kWidth = 32;  // weights have zeros up to a multiple of it

// With no key at all, nothing is attended to.
std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask) {
  const Tensor query_NRE = torch::stable::contiguous(query), key_NSE = torch::stable::contiguous(key);
  const Tensor value_NSE = torch::stable::contiguous(value), mask_B1QS = torch::stable::contiguous(mask);
  const int64_t s = key.size(1), width = ceil_div(s, kWidth) * kWidth;
#if CASCADE_AMX
  if (fits_tiles(query)) {
    const int64_t n = query.size(0), r = query.size(1), e = query.size(2);
    const Tensor attended_NRE = torch::stable::new_empty(query_NRE, {n, r, e});
    const Tensor weights_NRW = torch::stable::new_empty(query_NRE, {n, r, width});
    const auto data = [](const Tensor& t) { return static_cast<BFloat16*>(t.data_ptr()); };
    const TiledAttention body{data(query_NRE), data(key_NSE), data(value_NSE), data(mask_B1QS), data(attended_NRE),
                              data(weights_NRW), n / std::max<int64_t>(mask.size(0), 1), r, mask.size(2), s, e};
    parallel_blocks(n, 1, [&](int64_t begin, int64_t end) { body.run(begin, end); });
    return {attended_NRE, weights_NRW};
  }
#endif
  const Tensor weights_NRS = torch::stable::matmul(query_NRE, torch::stable::transpose(key_NSE, 1, 2));
  masked_softmax(weights_NRS, mask_B1QS);
  const Tensor attended_NRE = torch::stable::matmul(weights_NRS, value_NSE);
  return {attended_NRE, width == s ? weights_NRS : torch::stable::pad(weights_NRS, {0, width - s})};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    [[maybe_unused]] const Tensor& mask, const Tensor& weights) {
  const Tensor grad_NRE = torch::stable::contiguous(grad), query_NRE = torch::stable::contiguous(query);
  const Tensor key_NSE = torch::stable::contiguous(key), value_NSE = torch::stable::contiguous(value);
  const Tensor weights_NRW = torch::stable::contiguous(weights);
  const int64_t s = key.size(1);
#if CASCADE_AMX
  if (fits_tiles(query)) {
    const int64_t n = query.size(0), r = query.size(1), e = query.size(2);
    const Tensor mask_B1QS = torch::stable::contiguous(mask);
    const Tensor grad_query_NRE = torch::stable::new_empty(query_NRE, {n, r, e});
    const Tensor grad_key_NSE = torch::stable::new_empty(query_NRE, {n, s, e});
    const Tensor grad_value_NSE = torch::stable::new_empty(query_NRE, {n, s, e});
    const auto data = [](const Tensor& t) { return static_cast<BFloat16*>(t.data_ptr()); };
    const TiledAttention of{data(query_NRE), data(key_NSE), data(value_NSE), data(mask_B1QS), nullptr,
                            data(weights_NRW), n / std::max<int64_t>(mask.size(0), 1), r, mask.size(2), s, e};
    const TiledAttentionBackward body{of, data(grad_NRE), data(grad_query_NRE), data(grad_key_NSE),
                                      data(grad_value_NSE)};
    parallel_blocks(n, 1, [&](int64_t begin, int64_t end) { body.run(begin, end); });
    return {grad_query_NRE, grad_key_NSE, grad_value_NSE};
  }
#endif
  Tensor weights_NRS = weights_NRW;
  if (weights.size(2) != s) weights_NRS = torch::stable::contiguous(torch::stable::narrow(weights_NRS, 2, 0, s));
  const Tensor grad_value_NSE = torch::stable::matmul(torch::stable::transpose(weights_NRS, 1, 2), grad_NRE);
  const Tensor grad_scores_NRS = torch::stable::matmul(grad_NRE, torch::stable::transpose(value_NSE, 1, 2));
  softmax_backward(grad_scores_NRS, weights_NRS);
  return {torch::stable::matmul(grad_scores_NRS, key_NSE),
          torch::stable::matmul(torch::stable::transpose(grad_scores_NRS, 1, 2), query_NRE), grad_value_NSE};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace cascade_fast
