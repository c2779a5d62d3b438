"""The product of a gated MLP and its gradients, one pass over memory each.

    out = silu(gate) * up,   silu(x) = x * s(x),   s(x) = 1 / (1 + e^-x)
    grad_gate = grad * up * (s + silu * (1 - s)),   grad_up = grad * silu

gate, up, grad: (N, F), one dtype of float32, float16 and bfloat16, any row stride; results contiguous. Arithmetic in
float32, rounded once. Contiguous matrices are taken as one row.

Shape legend: N rows, F intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, round_to, unit_stride

BLOCK = 1024  # elements of a row a program


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # never of a large number
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _place(F, BLOCK: tl.constexpr):
    """The program's row, its columns and which of them there are."""
    blocks = tl.cdiv(F, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    col = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, col, col < F


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, F, stride_gate, stride_up, BLOCK: tl.constexpr):
    row, col, mask = _place(F, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    out = gate * _sigmoid(gate) * up
    tl.store(out_ptr + row * F + col, round_to(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, F, stride_grad, stride_gate, stride_up, BLOCK: tl.constexpr
):
    row, col, mask = _place(F, BLOCK)
    grad = tl.load(grad_ptr + row * stride_grad + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask=mask, other=0.0).to(tl.float32)
    share = _sigmoid(gate)
    silu = gate * share
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * F + col, round_to(grad * up * (share + silu * (1.0 - share)), dtype), mask=mask)
    tl.store(grad_up_ptr + row * F + col, round_to(grad * silu, dtype), mask=mask)


def _launch(kernel, inputs: tuple[Tensor, ...], outputs: int) -> tuple[Tensor, ...]:
    n, f = inputs[0].shape
    results = tuple(torch.empty(n, f, dtype=inputs[0].dtype, device=inputs[0].device) for _ in range(outputs))
    if n == 0 or f == 0:
        return results
    inputs = tuple(unit_stride(x) for x in inputs)
    if all(x.is_contiguous() for x in inputs):
        n, f = 1, n * f
    with on_device_of(inputs[0]):
        kernel[(n * triton.cdiv(f, BLOCK),)](
            *inputs, *results, f, *(x.stride(0) for x in inputs), BLOCK=BLOCK, num_warps=4
        )
    return results


def silu_mul(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``silu(gate) * up``. One launch."""
    return _launch(_silu_mul_kernel, (gate_NF, up_NF), 1)[0]


def silu_mul_backward(grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, ...]:
    """Gradients of gate and up. One launch."""
    return _launch(_silu_mul_backward_kernel, (grad_NF, gate_NF, up_NF), 2)
