"""Inputs of the selection operators, and what they must answer: of the benchmarks and of the tests.

Shape legend: N rows (tokens), D hidden size, K selected rows.
"""

import numpy as np
import torch
from torch import Tensor


def hidden_pair(n: int, d: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two ``(N, D)`` hidden states whose rows point together by a share that differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    h_in_ND = torch.randn(n, d, generator=generator)
    share_N1 = torch.rand(n, 1, generator=generator)
    h_out_ND = torch.randn(n, d, generator=generator).mul_(1 - share_N1).addcmul_(share_N1, h_in_ND)
    return h_in_ND.to(device, dtype), h_out_ND.to(device, dtype)


def cosine_truth(h_in_ND: Tensor, h_out_ND: Tensor) -> Tensor:
    """The score in float64; differentiable."""
    a_ND, b_ND = h_in_ND.double(), h_out_ND.double()
    return (a_ND * b_ND).sum(-1) / (a_ND.norm(dim=-1) * b_ND.norm(dim=-1) + 1e-8)


def select_truth(scores_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The selection by numpy: sorted by (is NaN, value, index), with one NaN for all of them.

    Always on the CPU: on a GPU torch.sort has a NaN with its sign set before all numbers.
    """
    values = scores_N.cpu().double().numpy()  # float64 holds float32's subnormals as normal numbers
    is_nan = np.isnan(values)
    values = np.where(is_nan, np.nan, values)
    order = np.lexsort((np.arange(len(values)), np.where(is_nan, 0, values), is_nan))
    padded = np.concatenate([[-np.inf], values[order], [np.inf]]).astype(np.float32)
    return torch.from_numpy(np.sort(order[:k])), torch.from_numpy(padded[k : k + 2])


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes, so that NaNs and the sign of zero are compared too."""
    return t.contiguous().view(torch.uint8) if t.numel() else t.new_empty(0, dtype=torch.uint8)
