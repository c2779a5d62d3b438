// Launchers of place_heads, take_heads and their gradients: one kernel each.
#include "place_heads.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.cuh"

namespace cascade {

// A part as torch has it.
struct PartTensors {
  Tensor x_KHE;        // contiguous but for the stride between tokens
  Tensor rows_BGRE;    // R = T * N; the last dimension contiguous
  Tensor index;        // (B * N,) int32 tokens; taking: (K,) int64 places
  const Tensor* into;  // (P, E); null: zero
  int64_t row_places;  // N
  float scale;
  bool turned;
};

inline Tensor with_contiguous_heads_alone(const Tensor& x) {
  const bool in_place = x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2));
  return in_place ? x : torch::stable::contiguous(x);
}

inline Tensor with_contiguous_last(const Tensor& rows) {
  return rows.stride(3) == 1 || rows.size(3) <= 1 ? rows : torch::stable::contiguous(rows);
}

template <bool kBack>
void launch_place_heads(const std::vector<PartTensors>& parts, const Tensor& cos, const Tensor& sin) {
  const Tensor& first = parts[0].x_KHE;
  const int64_t size = first.size(2), width = first.element_size();
  STD_TORCH_CHECK(size <= kMaxAngles, "cascade_fast: heads of ", size, " numbers are too long, at most ", kMaxAngles);
  if (size == 0) return;
  bool wide = size / 2 * width % 16 == 0;
  const auto aligned = [&](const Tensor& tensor, std::initializer_list<int64_t> strides) {
    wide = wide && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    for (const int64_t stride : strides) wide = wide && stride * width % 16 == 0;
  };
  for (const PartTensors& part : parts) {
    const Tensor& rows = part.rows_BGRE;
    aligned(part.x_KHE, {part.x_KHE.stride(0)});
    aligned(rows, {rows.stride(0), rows.stride(1), rows.stride(2)});
    if (part.into != nullptr) aligned(*part.into, {part.into->stride(0)});
  }
  for_dtype(first.scalar_type(), [&]<class T>() {
    using Bits = typename T::Bits;
    const auto launch = [&]<int kBytes>() {
      const int64_t words = size / 2 / Elements<T, kBytes>::kCount;
      PlacedHeads<T> all{};
      all.cos_KF = static_cast<const float*>(cos.const_data_ptr());
      all.sin_KF = static_cast<const float*>(sin.const_data_ptr());
      all.half = static_cast<int>(size / 2);
      int64_t blocks = 0, numbers = 0;
      for (const PartTensors& from : parts) {
        HeadsPart<T>& part = all.part[all.parts++];
        const Tensor& rows = from.rows_BGRE;
        part.x_KHE = static_cast<Bits*>(const_cast<void*>(from.x_KHE.const_data_ptr()));
        part.rows = static_cast<Bits*>(const_cast<void*>(rows.const_data_ptr()));
        part.x_stride = from.x_KHE.stride(0);
        part.b_stride = rows.stride(0), part.g_stride = rows.stride(1), part.n_stride = rows.stride(2);
        if (from.into != nullptr) {
          part.into_PE = static_cast<const Bits*>(from.into->const_data_ptr());
          part.into_stride = from.into->stride(0);
        }
        if (kBack) part.place_K = static_cast<const int64_t*>(from.index.const_data_ptr());
        if (!kBack) part.token_BN = static_cast<const int32_t*>(from.index.const_data_ptr());
        part.tokens = from.x_KHE.size(0), part.places = rows.size(0) * from.row_places;
        part.heads = static_cast<int>(from.x_KHE.size(1));
        part.times = static_cast<int>(part.heads / rows.size(1));
        part.row_places = static_cast<int>(from.row_places);
        part.scale = from.scale, part.turned = from.turned;
        part.block_units = static_cast<int>(std::max<int64_t>(1, kRotateThreads / (part.heads * words)));
        if (part.turned) {
          part.block_units = std::min<int>(part.block_units, static_cast<int>(kMaxAngles / size));
          numbers = std::max(numbers, part.block_units * size);
        }
        part.first_block = blocks;
        blocks += blocks_for(kBack ? part.tokens : part.places, part.block_units);
      }
      if (blocks == 0) return;
      place_heads_kernel<T, kBytes, kBack>
          <<<blocks_for(blocks, 1), kRotateThreads, numbers * sizeof(float), current_stream(first)>>>(all);
    };
    if (wide) return launch.template operator()<16>();
    launch.template operator()<static_cast<int>(sizeof(Bits))>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> place_heads_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
    const Tensor& token_of_slot, const Tensor& token_of_place, const Tensor& keys, const Tensor& values, double scale) {
  const DeviceGuard guard(query.get_device_index());
  const int64_t sequences = token_of_slot.size(0), queries = token_of_slot.size(1), seq_len = token_of_place.size(1);
  const int64_t heads = query.size(1), groups = key.size(1), size = query.size(2);
  const Tensor cos_KF = torch::stable::contiguous(cos), sin_KF = torch::stable::contiguous(sin);
  const Tensor slots = torch::stable::contiguous(token_of_slot), places = torch::stable::contiguous(token_of_place);
  const Tensor keys_PE = with_contiguous_rows(keys), values_PE = with_contiguous_rows(values);
  const Tensor query_out = torch::stable::new_empty(query, {sequences, groups, heads / groups * queries, size});
  const Tensor key_out = torch::stable::new_empty(query, {sequences, groups, seq_len, size});
  const Tensor value_out = torch::stable::new_empty(query, {sequences, groups, seq_len, size});
  launch_place_heads<false>(
      {{with_contiguous_heads_alone(query), query_out, slots, nullptr, queries, static_cast<float>(scale), true},
       {with_contiguous_heads_alone(key), key_out, places, &keys_PE, seq_len, 1.f, true},
       {with_contiguous_heads_alone(value), value_out, places, &values_PE, seq_len, 1.f, false}},
      cos_KF, sin_KF);
  return {query_out, key_out, value_out};
}

std::tuple<Tensor, Tensor, Tensor> place_heads_backward_cuda(
    const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, const Tensor& cos, const Tensor& sin,
    const Tensor& slot, const Tensor& place, int64_t times, double scale) {
  const DeviceGuard guard(grad_query.get_device_index());
  const int64_t tokens = slot.size(0), groups = grad_key.size(1), size = grad_key.size(3);
  const Tensor cos_KF = torch::stable::contiguous(cos), sin_KF = torch::stable::contiguous(sin);
  const Tensor slot_K = torch::stable::contiguous(slot), place_K = torch::stable::contiguous(place);
  const Tensor query_KHE = torch::stable::new_empty(grad_query, {tokens, groups * times, size});
  const Tensor key_KGE = torch::stable::new_empty(grad_query, {tokens, groups, size});
  const Tensor value_KGE = torch::stable::new_empty(grad_query, {tokens, groups, size});
  const int64_t seq_len = grad_key.size(2);
  launch_place_heads<true>({{query_KHE, with_contiguous_last(grad_query), slot_K, nullptr, grad_query.size(2) / times,
                             static_cast<float>(scale), true},
                            {key_KGE, with_contiguous_last(grad_key), place_K, nullptr, seq_len, 1.f, true},
                            {value_KGE, with_contiguous_last(grad_value), place_K, nullptr, seq_len, 1.f, false}},
                           cos_KF, sin_KF);
  return {query_KHE, key_KGE, value_KGE};
}

Tensor take_heads_cuda(const Tensor& rows, const Tensor& slot, int64_t times) {
  const DeviceGuard guard(rows.get_device_index());
  const Tensor out_KHE = torch::stable::new_empty(rows, {slot.size(0), rows.size(1) * times, rows.size(3)});
  const Tensor slot_K = torch::stable::contiguous(slot);
  launch_place_heads<true>(
      {{out_KHE, with_contiguous_last(rows), slot_K, nullptr, rows.size(2) / times, 1.f, false}}, slot_K, slot_K);
  return out_KHE;
}

Tensor take_heads_backward_cuda(const Tensor& grad, const Tensor& token_of_slot, int64_t times) {
  const DeviceGuard guard(grad.get_device_index());
  const int64_t sequences = token_of_slot.size(0), queries = token_of_slot.size(1), groups = grad.size(1) / times;
  const Tensor slots = torch::stable::contiguous(token_of_slot);
  // In memory as the memory-efficient kernel wants a gradient: it copies one of another order.
  const Tensor out_BRGE = torch::stable::new_empty(grad, {sequences, times * queries, groups, grad.size(2)});
  const Tensor out_BGRE = torch::stable::transpose(out_BRGE, 1, 2);
  launch_place_heads<false>({{with_contiguous_heads_alone(grad), out_BGRE, slots, nullptr, queries, 1.f, false}}, slots,
                            slots);
  return out_BGRE;
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("place_heads", TORCH_BOX(&cascade::place_heads_cuda));
  m.impl("place_heads_backward", TORCH_BOX(&cascade::place_heads_backward_cuda));
  m.impl("take_heads", TORCH_BOX(&cascade::take_heads_cuda));
  m.impl("take_heads_backward", TORCH_BOX(&cascade::take_heads_backward_cuda));
}
