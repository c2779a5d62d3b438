"""Inputs of the tests of a layer's operators, and what they are held to.

Shape legend: N tokens, D hidden size, K tokens, H heads, E head size, P rows of one head,
B sequences, Q queries, S keys.
"""

import op_cases as cases
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
INF, NAN = torch.inf, torch.nan


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounded_once(ours, truth, dtype, atol=1e-6):
    """Half a unit in the last place of the dtype, besides float32's own error."""
    assert ours.dtype == dtype
    assert ours.shape == truth.shape
    assert ((ours.double() - truth).abs() <= truth.abs() * (torch.finfo(dtype).eps / 2 + 4e-6) + atol).all()


def bits_equal(results, others):
    return all(torch.equal(cases.bits(a), cases.bits(b)) for a, b in zip(results, others, strict=True))


def strided(t):
    """The values of ``t``, every other one of its memory; between them is NaN."""
    room = torch.stack((t, torch.full_like(t, NAN if t.is_floating_point() else -7)), dim=-1)
    return room[..., 0]


def norm_inputs(n, d, dtype):
    """``x``, ``added``, ``weight`` of ``add_rms_norm``, and gradients of its two outputs."""
    grads = randn(n, d, seed=3), randn(n, d, dtype=dtype, seed=4)
    return randn(n, d) * 3, randn(n, d, dtype=dtype, seed=1), randn(d, seed=2), grads


def head_rows(k, heads, size, rows, dtype=torch.float32, beyond=0):
    """Arguments of ``rotate_rows``: K tokens that are placed, and ``beyond`` that are not."""
    x, into = randn(k + beyond, heads, size, dtype=dtype), randn(rows, size, dtype=dtype, seed=1)
    angle = randn(k, size // 2, seed=2) * 3
    return x, angle.cos(), angle.sin(), cases.some_index(rows, k * heads, seed=3, ascending=False), into


def scores_and_mask(b, h, q, s, dtype=torch.float32):
    """Scores, and a mask of some numbers and many -inf, none of them at the first key."""
    scores, mask = randn(b, h, q, s).mul(4).to(dtype), randn(b, 1, q, s, dtype=dtype, seed=1)
    hidden = (randn(b, 1, q, s, seed=2) > 0) & (torch.arange(s) > 0)
    return scores, mask.masked_fill(hidden, -INF)


def calls(n, dtype=torch.float32):
    """``{op: args}`` on matrices of ``n`` rows or about."""
    x, added, weight, (grad_sum, grad) = norm_inputs(n, 33, dtype)
    inv_rms = torch.rsqrt(x.square().mean(-1) + EPS)
    rows = head_rows(n, 2, 10, 2 * n + 3, dtype, beyond=2)
    scores, mask = scores_and_mask(2, 3, n, 21, dtype)
    numbers = [randn(n, 3, seed=i) for i in range(9)]
    return {
        "add_rms_norm": (x, added, weight, EPS),
        "add_rms_norm_backward": (grad_sum, grad, x, weight, inv_rms),
        "scale_into_": ([torch.zeros(n, 3, dtype=dtype) for _ in numbers], numbers, 0.3),
        "silu_mul": (x.to(dtype), added),
        "silu_mul_backward": (grad, x.to(dtype), added),
        "rotate_rows": rows,
        "rotate_rows_backward": (randn(2 * n + 3, 10, dtype=dtype), *rows[1:4], 2, n + 2),
        "masked_softmax_": (scores, mask),
        "softmax_backward_": (scores, scores_and_mask(2, 3, n, 21, dtype)[0].softmax(-1)),
    }
