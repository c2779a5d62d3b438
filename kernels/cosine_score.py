"""Cosine similarity of row pairs, one pass over both inputs.

    score[n] = <a[n], b[n]> / (|a[n]| |b[n]| + 1e-8)

a, b: (N, D) float32, float16 or bfloat16, any row stride. score: (N,) float32. All arithmetic in float32.

Each program reduces BN rows; three running [BN, BD] sums stay in registers and meet across threads once, at the end.
The definition is that of torch.nn.functional.cosine_similarity, except that eps is added to the product of norms.

Shape legend: N rows (tokens), D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, tile_shape, unit_stride

EPS = 1e-8


@triton.jit(do_not_specialize=["N"])
def _cosine_score_kernel(
    a_ptr, b_ptr, score_ptr, N, D, stride_a, stride_b, EPS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    in_rows = row < N
    a_row_ptr = a_ptr + row * stride_a
    b_row_ptr = b_ptr + row * stride_b
    dot = tl.zeros([BN, BD], tl.float32)
    aa = tl.zeros([BN, BD], tl.float32)
    bb = tl.zeros([BN, BD], tl.float32)
    for start in range(0, D, BD):
        col = start + tl.arange(0, BD)  # [BD]
        mask = in_rows[:, None] & (col < D)[None, :]
        a = tl.load(a_row_ptr[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        b = tl.load(b_row_ptr[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        dot += a * b
        aa += a * a
        bb += b * b
    # Product of roots, not root of the product: that one over- and underflows earlier.
    norms = tl.sqrt_rn(tl.sum(aa, axis=1)) * tl.sqrt_rn(tl.sum(bb, axis=1))  # [BN]
    tl.store(score_ptr + row, tl.div_rn(tl.sum(dot, axis=1), norms + EPS), mask=in_rows)


def cosine_score(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """Scores of each row pair, ``(N,)`` float32. One launch."""
    n, d = h_in_ND.shape
    score_N = torch.empty(n, dtype=torch.float32, device=h_in_ND.device)
    if n == 0:
        return score_N
    h_in_ND, h_out_ND = unit_stride(h_in_ND), unit_stride(h_out_ND)
    bn, bd = tile_shape(d, h_in_ND.element_size())
    with on_device_of(h_in_ND):
        _cosine_score_kernel[(triton.cdiv(n, bn),)](
            h_in_ND, h_out_ND, score_N, n, d, h_in_ND.stride(0), h_out_ND.stride(0), EPS=EPS, BN=bn, BD=bd, num_warps=4
        )
    return score_N
