"""Rows put back into a copy of a table, bitwise copies (float32 arithmetic for ``add``).

    out = into;  out[index[i]] = rows[i]  or, with add, into[index[i]] + rows[i]

into: (N, D), rows: (K, D), float32, float16 or bfloat16, any row stride. index: (K,) int64, no index twice. out is
contiguous.

A scatter of many rows first inverts the index and then writes each row of the result once, from where it belongs
(2 N D moved); one of few rows copies ``into`` and overwrites (2 N D + 2 K D, but a launch less); one of all rows needs
neither. The launcher takes the one that moves fewer bytes.

Shape legend: N rows (tokens), D hidden size, K selected rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_ints, check_index_on_cpu, on_device_of, round_to, tile_shape, unit_stride

INVERT_BLOCK = 1024
LAUNCH_BYTES = 1 << 20  # what a T4 moves in the time of a launch, about 4 us


@triton.jit(do_not_specialize=["K"])
def _scatter_rows_invert_kernel(index_ptr, source_ptr, K, stride_index, BK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)  # [BK]
    row = tl.load(index_ptr + i * stride_index, mask=i < K, other=0)
    tl.store(source_ptr + row, i.to(tl.int32), mask=i < K)


@triton.jit(do_not_specialize=["N"])
def _scatter_rows_merge_kernel(
    rows_ptr, source_ptr, into_ptr, out_ptr, N, D, stride_rows, stride_into,
    ADD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    in_rows = n < N
    source = tl.load(source_ptr + n, mask=in_rows, other=-1).to(tl.int64)  # [BN], -1: not replaced
    hit = source >= 0
    from_ptr = rows_ptr + source * stride_rows
    into_ptr += n * stride_into
    out_ptr += n * D
    for start in range(0, D, BD):
        col = start + tl.arange(0, BD)  # [BD]
        in_cols = (col < D)[None, :]
        x = tl.load(from_ptr[:, None] + col[None, :], mask=hit[:, None] & in_cols, other=0)  # [BN, BD]
        if ADD:
            y = tl.load(into_ptr[:, None] + col[None, :], mask=in_rows[:, None] & in_cols, other=0)
            out = tl.where(hit[:, None], round_to(x.to(tl.float32) + y.to(tl.float32), y.dtype), y)
        else:
            y = tl.load(into_ptr[:, None] + col[None, :], mask=(in_rows & ~hit)[:, None] & in_cols, other=0)
            out = tl.where(hit[:, None], x, y)
        tl.store(out_ptr[:, None] + col[None, :], out, mask=in_rows[:, None] & in_cols)


@triton.jit(do_not_specialize=["K"])
def _scatter_rows_put_kernel(
    rows_ptr, index_ptr, into_ptr, out_ptr, K, D, stride_rows, stride_index, stride_into,
    ADD: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)  # [BK]
    in_rows = i < K
    row = tl.load(index_ptr + i * stride_index, mask=in_rows, other=0)  # [BK]
    for start in range(0, D, BD):
        col = start + tl.arange(0, BD)  # [BD]
        mask = in_rows[:, None] & (col < D)[None, :]
        x = tl.load((rows_ptr + i * stride_rows)[:, None] + col[None, :], mask=mask, other=0)  # [BK, BD]
        if ADD:
            y = tl.load((into_ptr + row * stride_into)[:, None] + col[None, :], mask=mask, other=0)
            x = round_to(x.to(tl.float32) + y.to(tl.float32), y.dtype)
        tl.store((out_ptr + row * D)[:, None] + col[None, :], x, mask=mask)


def scatter_rows(rows_KD: Tensor, index_K: Tensor, into_ND: Tensor, add: bool) -> Tensor:
    """A copy of ``into_ND`` whose rows ``index_K`` are replaced by (or increased by) ``rows_KD``."""
    (n, d), k = into_ND.shape, index_K.shape[0]
    check_index_on_cpu(index_K, n)
    out_ND = torch.empty(n, d, dtype=into_ND.dtype, device=into_ND.device)
    if out_ND.numel() == 0:
        return out_ND
    if k == 0:
        return out_ND.copy_(into_ND)
    rows, into, out = unit_stride(rows_KD), unit_stride(into_ND), out_ND
    if not add:
        rows, into, out = as_ints(rows), as_ints(into), as_ints(out)
    bn, bd = tile_shape(d, out.element_size())
    stride_rows, stride_into, stride_index = rows.stride(0), into.stride(0), index_K.stride(0)
    overwritten = 2 * k * d * out.element_size()
    with on_device_of(into_ND):
        if k < n and overwritten > 8 * n + 12 * k + LAUNCH_BYTES:
            source = torch.full((n,), -1, dtype=torch.int32, device=into.device)
            _scatter_rows_invert_kernel[(triton.cdiv(k, INVERT_BLOCK),)](
                index_K, source, k, stride_index, BK=INVERT_BLOCK, num_warps=4
            )
            _scatter_rows_merge_kernel[(triton.cdiv(n, bn),)](
                rows, source, into, out, n, d, stride_rows, stride_into, ADD=add, BN=bn, BD=bd, num_warps=4
            )
        else:
            if k < n:
                out.copy_(into)
            _scatter_rows_put_kernel[(triton.cdiv(k, bn),)](
                rows, index_K, into, out, k, d, stride_rows, stride_index, stride_into,
                ADD=add, BK=bn, BD=bd, num_warps=4,
            )  # fmt: skip
    return out_ND
