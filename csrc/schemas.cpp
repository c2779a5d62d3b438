// Schemas of the native bodies. CPU and CUDA files each register theirs under cascade_fast_native; Python picks one by
// name, and checks the arguments before it calls (cascade_fast/ops/schema.py), so the bodies trust shapes and dtypes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(cascade_fast_native, m) {
  m.def("cosine_score(Tensor h_in, Tensor h_out) -> Tensor");
  m.def("select_hard(Tensor scores, int k) -> (Tensor, Tensor)");
  m.def("gather_rows(Tensor hidden, Tensor index, Tensor[] carried) -> (Tensor, Tensor[])");
  m.def("scatter_rows(Tensor rows, Tensor index, Tensor into, bool add) -> Tensor");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, bool grad, float scale) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inv_rms, bool weight_grad) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor added, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor grad_sum, Tensor grad, Tensor sum, Tensor weight, Tensor inv_rms, "
      "bool weight_grad) -> (Tensor, Tensor, Tensor)");
  m.def("scale_into_(Tensor(a!)[] into, Tensor[] from, float scale) -> ()");
  m.def("low_rank(Tensor x, Tensor a) -> Tensor");
  m.def(
      "low_rank_backward(Tensor grad, Tensor both, Tensor a, Tensor[] grads, int[] ranks, float scale) -> "
      "(Tensor, Tensor, Tensor[])");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("rotate_rows(Tensor x, Tensor cos, Tensor sin, Tensor index, Tensor into) -> Tensor");
  m.def("rotate_rows_backward(Tensor grad, Tensor cos, Tensor sin, Tensor index, int heads, int tokens) -> Tensor");
  m.def(
      "place_heads(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor token_of_slot, "
      "Tensor token_of_place, Tensor keys, Tensor values, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "place_heads_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, Tensor sin, "
      "Tensor slot, Tensor place, int times, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("take_heads(Tensor rows, Tensor slot, int times) -> Tensor");
  m.def("take_heads_backward(Tensor grad, Tensor token_of_slot, int times) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor mask) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor weights) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("grad_norm(Tensor[] grads, Tensor? scale, float clip) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
      "Tensor(e!)[] copies, float lr, float beta1, float beta2, float eps, float weight_decay, Tensor? lr_now, "
      "Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "adamw8bit(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1, "
      "Tensor(e!)[] absmax2, int[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor? skipped) -> ()");
}
