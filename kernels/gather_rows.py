"""Rows out of a table, and the same entries of the small arrays that travel with them: bitwise copies.

    out[i] = hidden[index[i]],  and carried_out[c][i] = carried[c][index[i]]

hidden: (N, D) float32, float16 or bfloat16, any row stride. index: (K,) int64. carried: (N,) arrays of any dtype and
stride. out is contiguous.

Shape legend: N rows (tokens), D hidden size, K selected rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INT_OF_SIZE, as_ints, check_index_on_cpu, on_device_of, tile_shape, unit_stride

CARRIED = 4  # arrays that travel in one launch


@triton.jit(do_not_specialize=["K"])
def _gather_rows_kernel(
    hidden_ptr, index_ptr, out_ptr, c0_ptr, c1_ptr, c2_ptr, c3_ptr, o0_ptr, o1_ptr, o2_ptr, o3_ptr,
    K, D, stride_hidden, stride_index, stride_c0, stride_c1, stride_c2, stride_c3,
    CARRIED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)  # [BK]
    in_rows = i < K
    row = tl.load(index_ptr + i * stride_index, mask=in_rows, other=0)  # [BK]
    from_ptr = hidden_ptr + row * stride_hidden
    to_ptr = out_ptr + i * D
    for start in range(0, D, BD):
        col = start + tl.arange(0, BD)  # [BD]
        mask = in_rows[:, None] & (col < D)[None, :]
        x = tl.load(from_ptr[:, None] + col[None, :], mask=mask)  # [BK, BD]
        tl.store(to_ptr[:, None] + col[None, :], x, mask=mask)
    if CARRIED > 0:
        tl.store(o0_ptr + i, tl.load(c0_ptr + row * stride_c0, mask=in_rows), mask=in_rows)
    if CARRIED > 1:
        tl.store(o1_ptr + i, tl.load(c1_ptr + row * stride_c1, mask=in_rows), mask=in_rows)
    if CARRIED > 2:
        tl.store(o2_ptr + i, tl.load(c2_ptr + row * stride_c2, mask=in_rows), mask=in_rows)
    if CARRIED > 3:
        tl.store(o3_ptr + i, tl.load(c3_ptr + row * stride_c3, mask=in_rows), mask=in_rows)


def gather_rows(hidden_ND: Tensor, index_K: Tensor, carried: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Rows ``index_K`` of ``hidden_ND`` and of every ``(N,)`` array. One launch for the rows and four arrays."""
    (n, d), k = hidden_ND.shape, index_K.shape[0]
    check_index_on_cpu(index_K, n)
    out_KD = torch.empty(k, d, dtype=hidden_ND.dtype, device=hidden_ND.device)
    gathered = [torch.empty(k, dtype=array.dtype, device=array.device) for array in carried]
    if k == 0 or (d == 0 and not carried):
        return out_KD, gathered
    hidden, out = as_ints(unit_stride(hidden_ND)), as_ints(out_KD)
    sources, targets = [], []
    for source, target in zip(carried, gathered, strict=True):
        if source.element_size() in INT_OF_SIZE:
            sources.append(as_ints(source))
            targets.append(as_ints(target))
        else:  # complex128
            torch.index_select(source, 0, index_K, out=target)
    bk, bd = tile_shape(d, hidden.element_size())
    with on_device_of(hidden_ND):
        for first in range(0, max(len(sources), 1), CARRIED):
            c, o = sources[first : first + CARRIED], targets[first : first + CARRIED]
            unused = [index_K] * (CARRIED - len(c))
            _gather_rows_kernel[(triton.cdiv(k, bk),)](
                hidden, index_K, out, *c, *unused, *o, *unused, k, d if first == 0 else 0,
                hidden.stride(0), index_K.stride(0), *(x.stride(0) for x in c + unused),
                CARRIED=len(c), BK=bk, BD=bd, num_warps=4,
            )  # fmt: skip
    return out_KD, gathered
