"""RMSNorm of every row, of a sum too, and the gradients: one pass over memory each.

    s = x (+ added),        inv_rms = 1 / sqrt(mean(s^2) + eps),    out = weight * s * inv_rms
    g = grad * weight,      grad_x = inv_rms * (g - s * mean(g * s) * inv_rms^2)  (+ grad_sum)
    grad_weight = sum over the rows of grad * s * inv_rms

x, the sum, weight, inv_rms and the gradients of x and weight are float32; added, out and grad float32, float16 or
bfloat16. x, added and gradients: (N, D), any row stride; results contiguous. Arithmetic in float32, rounded once.

A program takes BN rows at a time and holds them, and the weight; rows of more than MAX_HELD columns are read again, in
parts. Each program leaves its rows' share of the weight's gradient; a second kernel adds the shares in their order.

Shape legend: N rows, D hidden size, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, round_to, unit_stride

TILE = 1024  # elements of a [BN, BD] tile of short rows
MAX_HELD = 8192  # columns
PROGRAMS = 4096  # at most; more rows than their tiles are taken in turn
PARTS = 512  # programs at most, where each leaves a share of the weight's gradient,
ROWS_PER_PART = 4  # and rows that each of them has at least, if there are so many
SUM_BP, SUM_BD = 32, 64  # the tile of the kernel that adds the shares


def norm_tile(d: int) -> tuple[int, int, int]:
    """(rows, columns, warps) for rows of ``d`` columns: 8 to 16 elements of each array a thread."""
    columns = min(triton.next_power_of_2(d), MAX_HELD)
    if d > columns:
        columns //= 2  # what a row is taken in parts for needs registers, too
    return max(1, TILE // columns), columns, max(4, columns // 512)


@triton.jit
def _columns(BD: tl.constexpr):
    """[BD], of which a thread takes four next to each other: 16 bytes of float32. In 16 bit it would take eight, and
    then the float32 of the same tile in two words 32 bytes apart, half a sector each."""
    return tl.max_contiguous(tl.arange(0, BD), 4)


@triton.jit
def _times(a, b):
    """a * b, which the compiler cannot draw into a sum across threads, where it would make fma(a, b, the other
    thread's product): rounded once in one thread and twice in the other, so that the two disagree on the sum."""
    return tl.fma(a, b, 0.0)


@triton.jit
def _summed(x_ptr, added_ptr, row, col, mask, stride_x, stride_added, ADD: tl.constexpr):
    """[BN, BD] of x, or of x + added."""
    s = tl.load(x_ptr + (row * stride_x)[:, None] + col[None, :], mask=mask, other=0.0)
    if ADD:
        s += tl.load(added_ptr + (row * stride_added)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["N", "TURNS"])
def _rms_norm_kernel(
    x_ptr, added_ptr, weight_ptr, sum_ptr, out_ptr, inv_rms_ptr, N, D, TURNS, eps, stride_x, stride_added,
    ADD: tl.constexpr, HELD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    col = _columns(BD)  # [BD]
    if HELD:
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0)  # [BD]
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)) * BN + tl.arange(0, BN)  # [BN]
        in_rows = row < N
        at = (row * D)[:, None] + col[None, :]  # of results
        mask = in_rows[:, None] & (col < D)[None, :]
        if HELD:
            s = _summed(x_ptr, added_ptr, row, col, mask, stride_x, stride_added, ADD)  # [BN, BD]
            if ADD:
                tl.store(sum_ptr + at, s, mask=mask)
            squares = _times(s, s)
        else:
            squares = tl.zeros([BN, BD], tl.float32)
            for start in range(0, D, BD):
                mask = in_rows[:, None] & (start + col < D)[None, :]
                s = _summed(x_ptr, added_ptr, row, start + col, mask, stride_x, stride_added, ADD)
                if ADD:
                    tl.store(sum_ptr + at + start, s, mask=mask)
                squares += s * s
        inv_rms = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / D + eps)  # [BN]
        tl.store(inv_rms_ptr + row, inv_rms, mask=in_rows)
        if HELD:
            out = s * inv_rms[:, None] * weight[None, :]
            tl.store(out_ptr + at, round_to(out, out_ptr.dtype.element_ty), mask=mask)
        else:
            for start in range(0, D, BD):
                mask = in_rows[:, None] & (start + col < D)[None, :]
                s = _summed(x_ptr, added_ptr, row, start + col, mask, stride_x, stride_added, ADD)
                weight = tl.load(weight_ptr + start + col, mask=start + col < D, other=0.0)
                out = s * inv_rms[:, None] * weight[None, :]
                tl.store(out_ptr + at + start, round_to(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_x(
    grad, x, weight, inv_rms, share, grad_sum_ptr, grad_x_ptr, grad_added_ptr, sum_at, at, mask, ADD: tl.constexpr
):
    """Writes the gradient of a [BN, BD] tile of x, and with ADD the same for what was added."""
    grad_x = inv_rms[:, None] * (grad * weight[None, :] - x * share[:, None])
    if ADD:
        grad_x += tl.load(grad_sum_ptr + sum_at, mask=mask, other=0.0)
        tl.store(grad_added_ptr + at, round_to(grad_x, grad_added_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_x_ptr + at, grad_x, mask=mask)


@triton.jit(do_not_specialize=["N", "TURNS"])
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, inv_rms_ptr, grad_sum_ptr, grad_x_ptr, grad_added_ptr, parts_ptr, N, D, TURNS,
    stride_grad, stride_x, stride_sum,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, HELD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    col = _columns(BD)  # [BD]
    part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * D + col
    if HELD:
        weight = tl.load(weight_ptr + col, mask=col < D, other=0.0)  # [BD]
        if WEIGHT:
            shares = tl.zeros([BN, BD], tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)) * BN + tl.arange(0, BN)  # [BN]
        in_rows = row < N
        at = (row * D)[:, None] + col[None, :]  # of results
        grad_at = (row * stride_grad)[:, None] + col[None, :]
        x_at = (row * stride_x)[:, None] + col[None, :]
        sum_at = (row * stride_sum)[:, None] + col[None, :]
        mask = in_rows[:, None] & (col < D)[None, :]
        inv_rms = tl.load(inv_rms_ptr + row, mask=in_rows, other=0.0)  # [BN]
        if HELD:
            grad = tl.load(grad_ptr + grad_at, mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
            x = tl.load(x_ptr + x_at, mask=mask, other=0.0)  # [BN, BD]
            products = _times(grad * weight[None, :], x)
        else:
            products = tl.zeros([BN, BD], tl.float32)
            for start in range(0, D, BD):
                mask = in_rows[:, None] & (start + col < D)[None, :]
                grad = tl.load(grad_ptr + grad_at + start, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + x_at + start, mask=mask, other=0.0)
                weight = tl.load(weight_ptr + start + col, mask=start + col < D, other=0.0)
                products += grad * weight[None, :] * x
        share = tl.sum(products, axis=1) * inv_rms * inv_rms / D  # [BN]
        if HELD:
            _grad_x(
                grad, x, weight, inv_rms, share, grad_sum_ptr, grad_x_ptr, grad_added_ptr, sum_at, at, mask, ADD
            )  # fmt: skip
            if WEIGHT:
                shares += grad * x * inv_rms[:, None]
        else:
            for start in range(0, D, BD):
                mask = in_rows[:, None] & (start + col < D)[None, :]
                grad = tl.load(grad_ptr + grad_at + start, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + x_at + start, mask=mask, other=0.0)
                weight = tl.load(weight_ptr + start + col, mask=start + col < D, other=0.0)
                _grad_x(
                    grad, x, weight, inv_rms, share, grad_sum_ptr, grad_x_ptr, grad_added_ptr, sum_at + start,
                    at + start, mask, ADD,
                )  # fmt: skip
                if WEIGHT:
                    in_cols = start + col < D
                    before = tl.load(part_ptr + start, mask=in_cols & (turn > 0), other=0.0)
                    now = before + tl.sum(grad * x * inv_rms[:, None], axis=0)
                    tl.store(part_ptr + start, now, mask=in_cols)
            if WEIGHT:
                tl.debug_barrier()  # the next turn's threads may read what other threads have written
    if HELD and WEIGHT:
        tl.store(part_ptr, tl.sum(shares, axis=0), mask=col < D)


@triton.jit(do_not_specialize=["P"])
def _rms_norm_sum_parts_kernel(parts_ptr, grad_weight_ptr, P, D, BP: tl.constexpr, BD: tl.constexpr):
    col = tl.program_id(0) * BD + tl.arange(0, BD)  # [BD]
    part = tl.arange(0, BP)  # [BP]
    total = tl.zeros([BP, BD], tl.float32)
    for start in range(0, P, BP):
        at = ((start + part).to(tl.int64) * D)[:, None] + col[None, :]
        total += tl.load(parts_ptr + at, mask=(start + part < P)[:, None] & (col < D)[None, :], other=0.0)
    tl.store(grad_weight_ptr + col, tl.sum(total, axis=0), mask=col < D)


def _norm(
    x_ND: Tensor, added_ND: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + added`` (None: ``x``), its norm and ``1 / rms``."""
    n, d = x_ND.shape
    out_ND = torch.empty(n, d, dtype=dtype, device=x_ND.device)
    inv_rms_N = torch.empty(n, dtype=torch.float32, device=x_ND.device)
    sum_ND = x_ND if added_ND is None else torch.empty(n, d, dtype=torch.float32, device=x_ND.device)
    if n == 0 or d == 0:
        return sum_ND, out_ND, inv_rms_N.fill_(torch.nan)  # the mean of nothing
    x_ND, weight_D = unit_stride(x_ND), weight_D.contiguous()
    added = x_ND if added_ND is None else unit_stride(added_ND)
    bn, bd, warps = norm_tile(d)
    tiles = triton.cdiv(n, bn)
    programs = min(tiles, PROGRAMS)
    with on_device_of(x_ND):
        _rms_norm_kernel[(programs,)](
            x_ND, added, weight_D, sum_ND, out_ND, inv_rms_N, n, d, triton.cdiv(tiles, programs), eps, x_ND.stride(0),
            added.stride(0), ADD=added_ND is not None, HELD=d <= bd, BN=bn, BD=bd, num_warps=warps,
        )  # fmt: skip
    return sum_ND, out_ND, inv_rms_N


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm in ``dtype``, and ``1 / rms(x)``, ``(N,)`` float32. One launch."""
    return _norm(x_ND, None, weight_D, eps, dtype)[1:]


def add_rms_norm(x_ND: Tensor, added_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x + added``, its norm in the dtype of ``added``, and ``1 / rms``. One launch."""
    return _norm(x_ND, added_ND, weight_D, eps, added_ND.dtype)


def _backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor, grad_sum_ND: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of what was added to it (with ``grad_sum_ND``) and of the weight (if asked for)."""
    n, d = x_ND.shape
    grad_x_ND = torch.empty(n, d, dtype=torch.float32, device=x_ND.device)
    grad_added_ND = grad_x_ND if grad_sum_ND is None else torch.empty(n, d, dtype=grad_ND.dtype, device=x_ND.device)
    grad_weight_D = torch.empty(d if weight_grad else 0, dtype=torch.float32, device=x_ND.device)
    if n == 0 or d == 0:
        return grad_x_ND, grad_added_ND, grad_weight_D.zero_()
    grad_ND, x_ND = unit_stride(grad_ND), unit_stride(x_ND)
    weight_D, inv_rms_N = weight_D.contiguous(), inv_rms_N.contiguous()
    grad_sum = x_ND if grad_sum_ND is None else unit_stride(grad_sum_ND)
    bn, bd, warps = norm_tile(d)
    tiles = triton.cdiv(n, bn)
    programs = min(tiles, min(PARTS, triton.cdiv(n, ROWS_PER_PART)) if weight_grad else PROGRAMS)
    parts_PD = torch.empty(programs if weight_grad else 0, d, dtype=torch.float32, device=x_ND.device)
    with on_device_of(x_ND):
        _rms_norm_backward_kernel[(programs,)](
            grad_ND, x_ND, weight_D, inv_rms_N, grad_sum, grad_x_ND, grad_added_ND, parts_PD, n, d,
            triton.cdiv(tiles, programs), grad_ND.stride(0), x_ND.stride(0), grad_sum.stride(0),
            ADD=grad_sum_ND is not None, WEIGHT=weight_grad, HELD=d <= bd, BN=bn, BD=bd, num_warps=warps,
        )  # fmt: skip
        if weight_grad:
            _rms_norm_sum_parts_kernel[(triton.cdiv(d, SUM_BD),)](
                parts_PD, grad_weight_D, programs, d, BP=SUM_BP, BD=SUM_BD, num_warps=4
            )
    return grad_x_ND, grad_added_ND, grad_weight_D


def rms_norm_backward(
    grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; the second, a launch of its own, is empty unless asked for."""
    grad_x_ND, _, grad_weight_D = _backward(grad_ND, x_ND, weight_D, inv_rms_N, None, weight_grad)
    return grad_x_ND, grad_weight_D


def add_rms_norm_backward(
    grad_sum_ND: Tensor, grad_ND: Tensor, sum_ND: Tensor, weight_D: Tensor, inv_rms_N: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, the same for what was added in the dtype of ``grad``, and that of the weight; the last, a
    launch of its own, is empty unless asked for."""
    return _backward(grad_ND, sum_ND, weight_D, inv_rms_N, grad_sum_ND, weight_grad)
