"""Inputs and oracles of the operators' tests; those that the benchmarks need, too, are theirs.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.operator_inputs import bits, cosine_truth, hidden_pair, select_truth  # noqa: F401 (the tests find them here)
from cascade_fast import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "every_other_column", "every_third_row", "offset", "one_row_expanded")

# (N, D): empty either way, one element, below / at / above the 32 values a CPU kernel takes at once, odd, real.
SHAPES = ((0, 8), (3, 0), (1, 1), (5, 1), (7, 31), (4, 32), (9, 33), (13, 65), (129, 96), (67, 577), (300, 576))


def need(backend: str) -> str:
    """Skips where the extension is missing; fails instead where CASCADE_FAST_REQUIRE_EXT=1 says it must be there."""
    of_cpu = [op for op in ops.OPS if op not in ops.GPU_OPS]
    reasons = [reason for op in of_cpu if (reason := ops.why_not(op, torch.device("cpu"), backend))]
    if reasons:
        required = os.environ.get("CASCADE_FAST_REQUIRE_EXT", "0") not in ("", "0")
        (pytest.fail if required else pytest.skip)(f"backend {backend}: {reasons[0]}")
    return backend


def with_layout(t_ND: Tensor, layout: str) -> Tensor:
    """The values of ``t_ND`` (for ``one_row_expanded``: its first row, N times) in memory laid out as named."""
    n, d = t_ND.shape
    if layout == "transposed":
        return t_ND.t().contiguous().t()
    if layout == "one_row_expanded":
        return t_ND[:1].expand(n, d)
    row_step, column_step, start = {
        "contiguous": (1, 1, 0),
        "every_other_column": (1, 2, 0),
        "every_third_row": (3, 1, 0),
        "offset": (1, 1, 1),  # rows that start at no multiple of 16 bytes
    }[layout]
    room = t_ND.new_full((row_step * n, column_step * d + start), torch.nan)
    view = room[::row_step, start::column_step][:n, :d]
    return view.copy_(t_ND)


def cosine_eager(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """The score as one would write it, in the inputs' own dtype: the error a kernel may make, too."""
    return (h_in_ND * h_out_ND).sum(-1) / (h_in_ND.norm(dim=-1) * h_out_ND.norm(dim=-1) + 1e-8)


def score_cases() -> dict[str, Tensor]:
    """``(N,)`` float32 scores that a selection may get wrong."""
    generator = torch.Generator().manual_seed(1)
    inf, nan = torch.inf, torch.nan
    tiny = 1e-45  # the smallest subnormal
    return {
        "empty": torch.empty(0),
        "one": torch.tensor([0.5]),
        "distinct": torch.randn(1000, generator=generator),
        "all_equal": torch.full((77,), -0.25),
        "few_values": torch.randint(-2, 3, (501,), generator=generator).float() / 4,
        "signed_zeros": torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0, -1.0, tiny, -tiny]),
        "nan_and_inf": torch.tensor([nan, inf, 1.0, -inf, nan, -nan, -1.0, inf, -inf]),
        "all_nan": torch.full((9,), nan),
        "neighbours": torch.tensor(np.nextafter(np.float32(1), np.float32(2)) * np.ones(5, np.float32)).index_fill(
            0, torch.tensor([1, 3]), 1.0
        ),
        "ascending": torch.linspace(-1, 1, 333),
        "descending": torch.linspace(1, -1, 333),
        "cosine_like": torch.rand(4097, generator=generator).sqrt(),
        "enough_for_threads": (torch.rand(400_003, generator=generator) * 1000).round() / 1000,
    }


# Every kind of float32: NaN of both signs and several payloads, both infinities, both zeros, subnormals, extremes.
SPECIAL_BITS = (
    *(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000),
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000),
    *(0x7F7FFFFF, 0xFF7FFFFF),
)


def special_scores(*shape: int, seed: int = 0) -> Tensor:
    """Scores of every kind, all of them many times; one in four is an ordinary number, rounded so that it has ties."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.from_numpy(np.array(SPECIAL_BITS, dtype=np.uint32).view(np.float32))
    scores = special[torch.randint(len(SPECIAL_BITS), shape, generator=generator)]
    ordinary = torch.rand(shape, generator=generator) < 0.25
    return torch.where(ordinary, (2 * torch.randn(shape, generator=generator)).round(), scores)


def assert_selected(index_BK: Tensor, bounds_B2: Tensor, scores_BN: Tensor, k: int) -> None:
    """Whether an operator's answer is :func:`select_truth` in every row."""
    assert index_BK.dtype == torch.int64
    assert index_BK.shape == (len(scores_BN), k)
    for index_K, bounds_2, scores_N in zip(index_BK.cpu(), bounds_B2.cpu(), scores_BN, strict=True):
        true_index_K, true_bounds_2 = select_truth(scores_N, k)
        assert torch.equal(index_K, true_index_K)
        torch.testing.assert_close(bounds_2, true_bounds_2, atol=0, rtol=0, equal_nan=True)


def some_index(n: int, k: int, seed: int = 0, ascending: bool = True) -> Tensor:
    """``(K,)`` int64 in ``[0, N)``, none twice."""
    index_K = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]
    return index_K.sort().values if ascending else index_K


def carried_arrays(n: int) -> list[Tensor]:
    """``(N,)`` arrays of every element size, contiguous and not, one with NaN bits that a copy must keep."""
    base_N = torch.arange(n)
    return [
        base_N,
        base_N.to(torch.int32).flip(0),
        (base_N % 3 == 0),
        base_N.to(torch.bfloat16).masked_fill(base_N % 5 == 0, torch.nan),
        base_N.to(torch.float64).repeat_interleave(2)[::2],
        torch.complex(base_N.double(), -base_N.double()),
        torch.tensor(7).expand(n),
    ]


def scatter_truth(rows_KD: Tensor, index_K: Tensor, into_ND: Tensor, add: bool) -> Tensor:
    """The scatter by indexing."""
    out_ND = into_ND.clone()
    if add:
        rows_KD = (into_ND[index_K].float() + rows_KD.float()).to(into_ND.dtype)
    out_ND[index_K] = rows_KD
    return out_ND


def one_call_of_each(n: int, d: int, scores: int | None = None) -> dict[str, tuple[tuple, dict]]:
    """``{op: (args, keywords other than backend)}``; ``scores`` gives the selection a number of its own."""
    h_in_ND, h_out_ND = hidden_pair(n, d, torch.float32)
    index_K = some_index(n, n // 2)
    scores_BN = torch.rand(1, scores or n, generator=torch.Generator().manual_seed(2)).mul(1e5).round()
    return {
        "cosine_score": ((h_in_ND, h_out_ND), {}),
        "select_hard": ((scores_BN, scores_BN.shape[1] // 2), {}),
        "gather_rows": ((h_in_ND, index_K, [torch.arange(n)]), {}),
        "scatter_rows": ((h_out_ND[: n // 2].clone(), index_K, h_in_ND), {"add": True}),
        "adamw8bit": (adamw8bit_arguments([(n, d), (7,), (0,)], coded=lambda i: i != 1), ADAMW_SETTINGS),
    }


ADAMW_SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def adamw8bit_arguments(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, coded=lambda i: True, step: int = 3
) -> tuple[list, ...]:
    """Parameters, gradients, a state with every code in it, and steps; tensor ``i`` has codes where ``coded(i)``."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator) / 20 for shape in shapes]
    # From nothing to a hundred times the usual within a block.
    grads = [
        (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 6 * 0.1).to(dtype)
        for shape in shapes
    ]
    state1, state2, absmax1, absmax2 = [], [], [], []
    for i, p in enumerate(params):
        blocks = -(-p.numel() // 256) if coded(i) else 0
        absmax1.append(torch.rand(blocks, generator=generator) * 1e-3)
        absmax2.append(torch.rand(blocks, generator=generator) * 1e-6)
        for state, scale in ((state1, 1e-3), (state2, 1e-6)):
            codes = torch.randint(0, 256, p.shape, generator=generator, dtype=torch.uint8)
            state.append(codes if coded(i) else codes.float() * scale / 256)
    return params, grads, state1, state2, absmax1, absmax2, [step + i for i in range(len(shapes))]


def adamw_arguments(
    shapes: list[tuple[int, ...]], dtypes=(torch.float32,), copies=(None,), step: float = 3.0
) -> tuple[list[Tensor], ...]:
    """Parameters, gradients, moments, steps, copies of rubbish; dtypes of gradients and copies take turns."""
    generator = torch.Generator().manual_seed(4)

    def randn(shape, size):
        return torch.randn(shape, generator=generator) * size

    params = [randn(shape, 0.05) for shape in shapes]
    grads = [randn(shape, 0.02).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    exp_avgs = [randn(shape, 1e-3) for shape in shapes]
    exp_avg_sqs = [randn(shape, 1e-2) ** 2 for shape in shapes]
    steps = [torch.tensor(step + i) for i in range(len(shapes))]
    kinds = [copies[i % len(copies)] for i in range(len(shapes))]
    made = [torch.empty(0) if k is None else torch.full(s, 9.0, dtype=k) for k, s in zip(kinds, shapes, strict=True)]
    return params, grads, exp_avgs, exp_avg_sqs, steps, made


def flat(result: object) -> list[Tensor]:
    """The tensors of an operator's result, or of its arguments."""
    if isinstance(result, Tensor):
        return [result]
    return [leaf for part in result for leaf in flat(part)] if isinstance(result, list | tuple) else []
