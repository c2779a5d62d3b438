"""Rotary positions of each token's heads, put where attention wants them in the same pass; and back.

    first, second = the halves of a head;  turned = (first cos - second sin, second cos + first sin)
    out = into;  out[index] = turned;  backward: heads taken back from their rows and turned by -sin

x: (K or more, H, E), into: (P, E), float32, float16 or bfloat16; cos, sin: (K, E / 2) float32, or empty: nothing is
turned. index: (K * H,) int64, no index twice. Arithmetic in float32, rounded once. A program takes a token with all its
heads, so that its angles are read once. Where some of ``into`` is kept, all of it is copied first.

Shape legend: K tokens, H heads, E head size, F = E / 2, P rows of E numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import as_ints, check_index_on_cpu, on_device_of, round_to

TILE = 512  # numbers of each half that a program holds, at most
MAX_BF = 128


def head_tile(heads: int, half: int) -> tuple[int, int]:
    """(heads, columns of a half) of a tile."""
    columns = min(triton.next_power_of_2(half), MAX_BF)
    return min(triton.next_power_of_2(heads), max(1, TILE // columns)), columns


@triton.jit
def _rotate_rows_kernel(
    x_ptr, cos_ptr, sin_ptr, index_ptr, rows_ptr, H, F, stride_x, placed,
    TURN: tl.constexpr, BACK: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.where(token < placed, H, 0)  # others, beyond K, stand nowhere: zero with BACK
    angles = tl.minimum(token, placed - 1)  # theirs: any
    for start in range(0, F, BF):
        col = start + tl.arange(0, BF)  # [BF]
        in_cols = col < F
        if TURN:
            cos = tl.load(cos_ptr + angles * F + col, mask=in_cols, other=0.0)[None, :]
            sin = tl.load(sin_ptr + angles * F + col, mask=in_cols, other=0.0)[None, :]
            if BACK:
                sin = -sin
        for first_head in range(0, H, BH):
            head = first_head + tl.arange(0, BH)  # [BH]
            row = tl.load(index_ptr + token * H + head, mask=head < heads, other=0)
            there = (head < heads)[:, None] & in_cols[None, :]
            x_at = x_ptr + token * stride_x + head[:, None].to(tl.int64) * (2 * F) + col[None, :]  # [BH, BF]
            row_at = rows_ptr + row[:, None] * (2 * F) + col[None, :]
            if BACK:
                from_at, to_at = row_at, x_at
            else:
                from_at, to_at = x_at, row_at
            one = tl.load(from_at, mask=there, other=0)
            two = tl.load(from_at + F, mask=there, other=0)
            if TURN:
                a, b = one.to(tl.float32), two.to(tl.float32)
                one = round_to(a * cos - b * sin, one.dtype)
                two = round_to(b * cos + a * sin, two.dtype)
            mask = (head < H)[:, None] & in_cols[None, :]
            tl.store(to_at, one, mask=mask)
            tl.store(to_at + F, two, mask=mask)


def _launch(
    x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, rows_PE: Tensor, programs: int, *, back: bool
) -> None:
    _, h, e = x_KHE.shape
    if programs == 0 or e == 0:
        return
    turn = cos_KF.numel() > 0
    if not turn:
        x_KHE, rows_PE = as_ints(x_KHE), as_ints(rows_PE)
    bh, bf = head_tile(h, e // 2)
    with on_device_of(rows_PE):
        _rotate_rows_kernel[(programs,)](
            x_KHE, cos_KF.contiguous(), sin_KF.contiguous(), index_Y.contiguous(), rows_PE, h, e // 2,
            x_KHE.stride(0), len(index_Y) // h, TURN=turn, BACK=back, BH=bh, BF=bf, num_warps=1,
        )  # fmt: skip


def rotate_rows(x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, into_PE: Tensor) -> Tensor:
    """A copy of ``into`` with the turned heads in rows ``index``. One launch where all rows are replaced, else two."""
    (_, h, e), p = x_KHE.shape, into_PE.shape[0]
    check_index_on_cpu(index_Y, p)
    out_PE = torch.empty(p, e, dtype=into_PE.dtype, device=into_PE.device)
    if len(index_Y) < p:
        out_PE.copy_(into_PE)
    if x_KHE.stride(2) != 1 or (h > 1 and x_KHE.stride(1) != e):
        x_KHE = x_KHE.contiguous()
    _launch(x_KHE, cos_KF, sin_KF, index_Y, out_PE, len(index_Y) // h, back=False)
    return out_PE


def rotate_rows_backward(
    grad_PE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, heads: int, tokens: int
) -> Tensor:
    """Rows taken back as ``(tokens, heads, E)`` and turned back; zero of tokens beyond K. One launch."""
    out_KHE = torch.empty(tokens, heads, grad_PE.shape[1], dtype=grad_PE.dtype, device=grad_PE.device)
    _launch(out_KHE, cos_KF, sin_KF, index_Y, grad_PE.contiguous(), tokens, back=True)
    return out_KHE
