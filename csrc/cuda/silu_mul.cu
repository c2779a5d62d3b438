// Launchers of silu_mul and its gradients: one kernel each.
#include "silu_mul.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.cuh"

namespace cascade {

template <class Body>
void launch_silu_mul(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
  int64_t rows = inputs[0].size(0), dim = inputs[0].size(1);
  if (rows == 0 || dim == 0) return;
  bool flat = true;
  for (const Tensor& matrix : inputs) flat = flat && row_stride(matrix) == dim;
  bool wide = true;
  for (const auto* list : {&inputs, &outputs}) {
    for (const Tensor& matrix : *list) {
      const bool begins = reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
      wide = wide && (flat ? begins : rows_aligned({&matrix}));
    }
  }
  if (flat) {
    dim *= rows;
    rows = 1;
  }
  for_dtype(inputs[0].scalar_type(), [&]<class T>() {
    using Bits = typename T::Bits;
    SiluRows<T, Body> all{};
    for (int k = 0; k < Body::kInputs; ++k) {
      all.in_NF[k] = static_cast<const Bits*>(inputs[k].const_data_ptr());
      all.stride[k] = row_stride(inputs[k]);
    }
    for (int k = 0; k < Body::kOutputs; ++k) all.out_NF[k] = static_cast<Bits*>(outputs[k].mutable_data_ptr());
    all.dim = dim;
    const auto launch = [&]<int kBytes>() {
      const int64_t words = dim / Elements<T, kBytes>::kCount;
      all.blocks_a_row = std::max<int64_t>(1, blocks_for(words, kSiluThreads * kSiluUnroll));
      silu_mul_kernel<T, kBytes, Body>
          <<<blocks_for(rows * all.blocks_a_row, 1), kSiluThreads, 0, current_stream(inputs[0])>>>(all);
    };
    if (wide) return launch.template operator()<16>();
    launch.template operator()<static_cast<int>(sizeof(Bits))>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline Tensor contiguous_like(const Tensor& matrix) {
  return torch::stable::new_empty(matrix, {matrix.size(0), matrix.size(1)});
}

Tensor silu_mul_cuda(const Tensor& gate, const Tensor& up) {
  const DeviceGuard guard(gate.get_device_index());
  const Tensor out_NF = contiguous_like(gate);
  launch_silu_mul<SiluMul>({with_contiguous_rows(gate), with_contiguous_rows(up)}, {out_NF});
  return out_NF;
}

std::tuple<Tensor, Tensor> silu_mul_backward_cuda(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const DeviceGuard guard(gate.get_device_index());
  const Tensor grad_gate_NF = contiguous_like(gate), grad_up_NF = contiguous_like(up);
  launch_silu_mul<SiluMulGrad>(
      {with_contiguous_rows(grad), with_contiguous_rows(gate), with_contiguous_rows(up)}, {grad_gate_NF, grad_up_NF});
  return {grad_gate_NF, grad_up_NF};
}

}  // namespace cascade

STABLE_TORCH_LIBRARY_IMPL(cascade_fast_native, CUDA, m) {
  m.impl("silu_mul", TORCH_BOX(&cascade::silu_mul_cuda));
  m.impl("silu_mul_backward", TORCH_BOX(&cascade::silu_mul_backward_cuda));
}
