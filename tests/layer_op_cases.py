"""Inputs of the tests of a layer's operators, and what they are held to.

Shape legend: N tokens, D hidden size, K tokens, H heads, E head size, P rows of one head,
B sequences, Q queries, S keys, F outputs of a layer, R ranks of all layers.
"""

import op_cases as cases
import torch

from cascade_fast import ops

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


def additive_mask(kind, b, q, s, dtype=torch.float32):
    """``(B, 1, Q, S)``, what is added to scores; every query sees a key, if there is one.

    causal: each query sees the keys up to its own. rows: the sequences of a pack, one after the other: each query sees
    those of its own. gaps: hard tokens, some of a sequence; beyond the last one padding, which sees the first key.
    numbers: any, and keys hidden anywhere.
    """
    query_Q1, key_S = torch.arange(q)[:, None], torch.arange(s)
    position_Q1 = (query_Q1 + max(s - q, 0)).clamp(max=max(s - 1, 0))
    if kind == "causal":
        seen = key_S <= position_Q1
    elif kind == "rows":
        length = s // 3 + 1
        seen = (key_S <= position_Q1) & (key_S // length == position_Q1 // length)
    elif kind == "gaps":
        hard = torch.sort(torch.rand(b, 1, q, 1, generator=torch.Generator().manual_seed(5)), dim=2).values * s
        seen = (key_S <= hard) & (query_Q1 < q - 1) | (key_S == 0)
    else:
        seen = (randn(b, 1, q, s, seed=2) < 0) | (key_S == 0)
    numbers = randn(b, 1, q, s, dtype=dtype, seed=1) if kind == "numbers" else torch.zeros(b, 1, q, s, dtype=dtype)
    return numbers.masked_fill(~seen, -INF)


def attention_inputs(b, groups, times, q, s, e, dtype=torch.float32, mask="causal"):
    """Query, key, value and mask of ``attention``: of each key head ``times`` heads; and a gradient of its result."""
    n, r = b * groups, times * q
    query, grad = (randn(n, r, e, seed=i).mul(scale).to(dtype) for i, scale in ((3, max(e, 1) ** -0.5), (4, 1.0)))
    key, value = (randn(n, s, e, dtype=dtype, seed=i) for i in (5, 6))
    return (query, key, value, additive_mask(mask, b, q, s, dtype)), grad


def low_rank_inputs(k, d, ranks, outputs, dtype=torch.float32):
    """``x`` and ``a`` of ``low_rank``; the gradients of its result and of what layers with ``outputs`` make of it."""
    r = sum(ranks)
    x, a, grad = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((k, d), (r, d), (k, d + r))))
    return x, a, grad, [randn(k, f, dtype=dtype, seed=3 + i) for i, f in enumerate(outputs)]


def calls(n, dtype=torch.float32):
    """``{op: args}`` on matrices of ``n`` rows or about."""
    x, added, weight, (grad_sum, grad) = norm_inputs(n, 33, dtype)
    inv_rms = torch.rsqrt(x.square().mean(-1) + EPS)
    rows = head_rows(n, 2, 10, 2 * n + 3, dtype, beyond=2)
    attended, grad_attended = attention_inputs(2, 2, 3, n // 16 + 2, 45, 32, dtype)
    _, weights = ops.attention(*attended, backend="reference")
    low_x, a, grad_both, grads_of_layers = low_rank_inputs(n, 64, (4, 0, 16), (32, 96, 64), dtype)
    both = ops.low_rank(low_x, a, backend="reference")
    numbers = [randn(n, 3, seed=i) for i in range(9)]
    return {
        "add_rms_norm": (x, added, weight, EPS),
        "add_rms_norm_backward": (grad_sum, grad, x, weight, inv_rms),
        "scale_into_": ([torch.zeros(n, 3, dtype=dtype) for _ in numbers], numbers, 0.3),
        "silu_mul": (x.to(dtype), added),
        "silu_mul_backward": (grad, x.to(dtype), added),
        "rotate_rows": rows,
        "rotate_rows_backward": (randn(2 * n + 3, 10, dtype=dtype), *rows[1:4], 2, n + 2),
        "attention": attended,
        "attention_backward": (grad_attended, *attended, weights),
        "low_rank": (low_x, a),
        "low_rank_backward": (grad_both, both, a, grads_of_layers, [4, 0, 16], 0.5),
    }
