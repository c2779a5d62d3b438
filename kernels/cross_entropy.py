"""Loss and entropy of every row of logits and, if asked, the gradient in their place: one program a row.

    loss[c] = log(sum_v e^logits[c, v]) - logits[c, label[c]]
    entropy[c] = -sum_v p[c, v] log p[c, v],  p = softmax(logits)
    logits[c, v] = scale * (p[c, v] - (v == label[c]))

logits: (C, V) float32, float16 or bfloat16, contiguous. label: (C,) int64, any stride. loss, entropy: (C,) float32. All
arithmetic in float32.

A program reads its row once with an online softmax (Milakov and Gimelshein, arXiv 1805.02867): each place of a tile
keeps a running maximum and two sums relative to it. For the gradient it reads the row again, from the end, as a cache
still has what was read last. (The CUDA C++ kernel keeps 96 KB of a row in registers; Triton has no array of them.)

Shape legend: C tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import check_index_on_cpu, on_device_of, round_to

NUM_WARPS = 32  # so many that few rows are under way at once: the second read should find them in the cache
TILE_BYTES = 16384  # 16 of each thread
LEAST_POWER = tl.constexpr(-200.0)  # exp of less is 0 in float32
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _times_exp(d, e):
    """d * e where e = exp(d): 0 and not NaN for d = -inf."""
    return tl.where(d < LEAST_POWER, 0.0, d) * e


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, label_ptr, loss_ptr, entropy_ptr, V, stride_label, scale, GRAD: tl.constexpr, BV: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + c * V
    label = tl.load(label_ptr + c * stride_label)
    # A label that is none makes its loss NaN.
    label_logit = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)

    most = tl.full([BV], LOWEST, tl.float32)
    e = tl.zeros([BV], tl.float32)  # sums of e^d and d e^d, where d is a logit less `most`
    de = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)  # [BV]
        # One of e^(most - higher) and e^(x - higher) is 1, the other this:
        d = -tl.abs(x - most)
        power = tl.exp(d)
        add = _times_exp(d, power)
        de = tl.where(x > most, de * power + add * e, de + add)
        e = tl.where(x > most, e * power + 1.0, e + power)
        most = tl.maximum(most, x)
    row_most = tl.max(most)
    d = most - row_most  # NaN in the lane of an infinity, and so are all sums
    power = tl.exp(d)
    row_de = tl.sum(de * power + _times_exp(d, power) * e)
    row_e = tl.sum(e * power)
    log_e = tl.log(row_e)
    tl.store(loss_ptr + c, log_e - (label_logit - row_most))
    tl.store(entropy_ptr + c, log_e - row_de / row_e)

    if GRAD:
        factor = scale / row_e
        for tile in range(0, tl.cdiv(V, BV)):
            v = (tl.cdiv(V, BV) - 1 - tile) * BV + tl.arange(0, BV)
            x = tl.load(row_ptr + v, mask=v < V, other=0.0).to(tl.float32)  # [BV]
            grad = tl.exp(x - row_most) * factor - tl.where(v == label, scale, 0.0)
            tl.store(row_ptr + v, round_to(grad, logits_ptr.dtype.element_ty), mask=v < V)


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor, grad: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and entropy, each ``(C,)`` float32; with ``grad`` the logits become ``scale`` times their gradient."""
    c, v = logits_CV.shape
    check_index_on_cpu(labels_C, v, "labels")
    loss_C = torch.empty(c, dtype=torch.float32, device=logits_CV.device)
    entropy_C = torch.empty_like(loss_C)
    if c > 0:
        with on_device_of(logits_CV):
            _cross_entropy_kernel[(c,)](
                logits_CV,
                labels_C,
                loss_C,
                entropy_C,
                v,
                labels_C.stride(0),
                scale,
                GRAD=grad,
                BV=TILE_BYTES // logits_CV.element_size(),
                num_warps=NUM_WARPS,
            )
    return loss_C, entropy_C
