"""Which tokens are hard: scores, the exact share of them, and the threshold that inference uses.

A *score* is low where a token is hard, whatever the criterion, so that one rule serves all: hard iff
``score <= threshold``.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from cascade_fast import ops

EVERY_TOKEN = torch.finfo(torch.float32).max  # a threshold that every score is at or below; JSON has no infinity


def threshold_text(threshold: float) -> str:
    """For people."""
    return "none: every token enters" if threshold == EVERY_TOKEN else f"{threshold:.4f}"


class NonFiniteScores(ValueError):
    """A score that is NaN or infinite: no token is harder or easier than that."""


@dataclass(frozen=True)
class Selection:
    """Hard tokens: ``index_K`` (K,) int64 ascending, and the threshold, a number float32 can hold."""

    index_K: Tensor
    threshold: float


def hard_count(hard_ratio: float, n: int) -> int:
    """``floor(r (n - 1)) + 1``: how many of ``n`` distinct scores are ``<=`` their r-quantile; 0 for n = 0.

    Computed on the decimal number as written: in binary 0.29 * 100 is 28.999..., whose floor would be one short.
    """
    return int(_exact(hard_ratio) * (n - 1)) + 1 if n > 0 else 0


def _exact(hard_ratio: float) -> Fraction:
    if not 0 < hard_ratio <= 1:
        raise ValueError(f"hard_ratio: {hard_ratio}; must be in (0, 1]")
    return Fraction(repr(float(hard_ratio)))


def select_hardest(scores_N: Tensor, hard_ratio: float) -> Selection:
    """The hardest ``floor(r (N - 1)) + 1`` tokens and the r-quantile of the scores (linear interpolation).

    The count holds with ties too: the lowest index goes first. Any N below 2^31 (``torch.quantile`` refuses more
    than 2^24).

    Args:
        scores_N: ``(N,)`` float32, finite, N >= 1.

    Raises:
        ValueError: no scores, a score that is not finite (NonFiniteScores), or a ratio outside (0, 1].
    """
    n = scores_N.shape[0]
    if n == 0:
        raise ValueError("scores: empty; there is no token to select")
    check_finite(scores_N)
    k = hard_count(hard_ratio, n)
    index_K, bounds_2 = ops.select_hard(scores_N, k)
    return Selection(index_K, quantile_threshold(*bounds_2.tolist(), hard_ratio=hard_ratio, n=n))


def quantile_threshold(kth: float, following: float, *, hard_ratio: float, n: int) -> float:
    """The r-quantile between the k-th and the (k+1)-th smallest of ``n`` scores, rounded to float32 so that the
    (k+1)-th stays above it."""
    if following == torch.inf:  # k = n: the largest score itself; the scores are finite
        return kth
    position = _exact(hard_ratio) * (n - 1)
    weight = float(position - int(position))
    threshold = torch.tensor(kth + weight * (following - kth), dtype=torch.float32).item()
    return kth if threshold >= following else threshold


def select_below(scores_N: Tensor, threshold: float) -> Tensor:
    """Indices of the tokens with ``score <= threshold``, ascending: the rule of inference. ``(K,)`` int64."""
    return (scores_N <= threshold).nonzero().squeeze(1)


def check_finite(scores_N: Tensor, sequence_N: Tensor | None = None, position_N: Tensor | None = None) -> None:
    """Raises NonFiniteScores naming the first token whose score is NaN or infinite, by its place if that is given."""
    bad_N = ~torch.isfinite(scores_N)
    if bad_N.any():
        token = int(bad_N.nonzero()[0])
        where = f"token {token}"
        if sequence_N is not None and position_N is not None:
            where = f"sequence {int(sequence_N[token])}, position {int(position_N[token])}"
        raise NonFiniteScores(
            f"scores: {int(bad_N.sum())} of {len(bad_N)} are not finite, the first at {where} "
            f"({scores_N[token].item()}); the hidden states overflowed (in float16: try --dtype float32) or the "
            "model's weights are damaged"
        )
