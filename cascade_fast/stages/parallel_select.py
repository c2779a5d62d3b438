"""The hardest tokens of a store, by several processes: each looks at its own part of the scores, and they exchange
counts, never scores.

It is a radix select (T. Alabi et al., "Fast k-selection algorithms for graphics processing units", ACM Journal of
Experimental Algorithmics 17, 2012). A float's bits, rearranged, sort as integers. Byte by byte, the most
significant first, the processes add up how many of their keys have each value of that byte, and so all know in which
bin the k-th smallest key is: four sums of 256 counts. Counts are int64: any number of tokens will do. Keys below the
k-th are hard, and of those equal to it the first rows, as in ``ops.select_hard``.

Scores are read in pieces, straight from the mapped file: what a process holds beside the index does not grow with
their number.

Shape legend: N rows, J of them with a label, M of these in a piece, K hard.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cascade_fast.base.sequences import NO_LABEL
from cascade_fast.runtime.processes import Processes
from cascade_fast.selection import Selection, check_finite, hard_count, quantile_threshold

PIECE_ROWS = 2**17  # half a MiB of keys, and a few times that of what is made of them
BINS = 256
SHIFTS = (24, 16, 8, 0)
LARGEST = 2**31 - 1  # no finite score's key


@dataclass(frozen=True)
class Piece:
    """Some tokens with a label.

    ``score_M``: (M,) float32. ``place_M``: (M,) int64, their rows from ``first_row`` on; None where they are all rows.
    """

    first_row: int
    score_M: Tensor
    place_M: Tensor | None = None

    def key_M(self) -> Tensor:
        """(M,) int32, in the order of the scores; -0.0 has the key of 0.0."""
        bits_M = self.score_M.view(torch.int32)  # sign and magnitude
        sign_M = bits_M >> 31  # 0 or -1
        return (bits_M & LARGEST).bitwise_xor_(sign_M).sub_(sign_M)

    def rows(self, is_in_M: Tensor) -> Tensor:
        """(...) int64, ascending: the rows of the tokens that ``is_in_M`` (M,) bool picks."""
        place = _places(is_in_M)
        return (place if self.place_M is None else self.place_M[place]) + self.first_row


@dataclass(frozen=True)
class Cut:
    """Where hard ends: every key below ``key``, and the first ``ties`` of the ``equal`` tokens that have it."""

    key: int
    ties: int
    equal: int


def pieces(score_N: Tensor, label_N: Tensor | None, rows: slice) -> Iterator[Piece]:
    """Those rows, as far as they have a label, in order; ``label_N`` None: all have one."""
    start, stop, _ = rows.indices(len(score_N))
    for first in range(start, stop, PIECE_ROWS):
        here = slice(first, min(first + PIECE_ROWS, stop))
        if label_N is None:
            yield Piece(first, score_N[here])
        else:
            place_M = (label_N[here] != NO_LABEL).nonzero().squeeze(1)
            yield Piece(first, score_N[here][place_M], place_M)


def tally(part: Iterable[Piece]) -> Tensor:
    """(2,) int64: how many tokens, and how many of their scores are not finite."""
    counts_2 = torch.zeros(2, dtype=torch.int64)
    for piece in part:
        counts_2[0] += len(piece.score_M)
        if len(piece.score_M) and not (piece.score_M.min() + piece.score_M.max()).isfinite():
            counts_2[1] += (~piece.score_M.isfinite()).sum()
    return counts_2


def histogram(part: Iterable[Piece], level: int, key: int) -> Tensor:
    """(256,) int64: how many keys have each value of byte ``level``, of those whose bytes before it are ``key``'s."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    shift = SHIFTS[level]
    for piece in part:
        key_M = piece.key_M()
        if level > 0:
            key_M = key_M[_places((key_M ^ key).bitwise_right_shift_(shift + 8) == 0)]
        byte_M = (key_M >> shift).bitwise_and_(255)
        counts += torch.bincount(byte_M ^ 128 if level == 0 else byte_M, minlength=BINS)  # negative keys come first
    return counts


def find_cut(k: int, histogram_of_all: Callable[[int, int], Tensor]) -> Cut:
    """The cut after the ``k`` smallest of all keys.

    Args:
        k: from 1 to their number.
        histogram_of_all: (level, key) -> the sum of every part's :func:`histogram`.
    """
    key, ties, equal = 0, k, 0
    for level, shift in enumerate(SHIFTS):
        counts = histogram_of_all(level, key)
        up_to = counts.cumsum(0)
        byte = int((up_to < ties).sum())
        equal = int(counts[byte])
        ties -= int(up_to[byte]) - equal
        key |= (byte - 128 if level == 0 else byte) << shift
    return Cut(key, ties, equal)


def least_above(part: Iterable[Piece], key: int) -> int:
    """The smallest key above ``key``; ``LARGEST`` where there is none."""
    least = LARGEST
    for piece in part:
        key_M = piece.key_M()
        above = key_M[_places(key_M > key)]
        if len(above):
            least = min(least, int(above.min()))
    return least


def hard_rows(part: Iterable[Piece], cut: Cut, ties: int) -> Iterator[Tensor]:
    """Rows of the hard tokens of ``part``, piece by piece, ascending; the first ``ties`` of those at the cut."""
    for piece in part:
        key_M = piece.key_M()
        is_hard_M = key_M < cut.key
        if ties > 0:
            tied = _places(key_M == cut.key)[:ties]
            is_hard_M[tied] = True
            ties -= len(tied)
        yield piece.rows(is_hard_M)


def _places(is_in_M: Tensor) -> Tensor:
    """As ``nonzero``, which is several times faster in numpy."""
    return torch.from_numpy(np.flatnonzero(is_in_M.numpy()))


def score_of(key: int) -> float:
    """The score with that key."""
    magnitude = torch.tensor(abs(key), dtype=torch.int32).view(torch.float32).item()
    return magnitude if key >= 0 else -magnitude


def select_hardest_in_parts(
    score_N: Tensor,
    hard_ratio: float,
    these: Processes,
    *,
    label_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    position_N: Tensor | None = None,
) -> Selection:
    """What ``select_hardest`` says of the tokens with a label, bit for bit; ``index_K`` are rows. All processes call it
    with the same arrays, mapped from the same files.

    Every process searches its part for the cut and then goes once through all scores for the index, which all of them
    need whole: reading 4 bytes a token takes less than being sent 8 bytes a hard one.

    Args:
        score_N: ``(N,)`` float32 on the host; finite where there is a label.
        label_N: ``(N,)`` int64; None: every row has one.
        sequence_N, position_N: ``(N,)``; name the token whose score is not finite.

    Raises:
        ValueError: as ``select_hardest``, in every process.
    """
    own = these.part(len(score_N))

    def part() -> Iterator[Piece]:
        return pieces(score_N, label_N, own)

    n, not_finite = these.sum_(tally(part())).tolist()
    if n == 0:
        raise ValueError("scores: empty; there is no token to select")
    if not_finite:
        row_J = slice(None) if label_N is None else (label_N != NO_LABEL).nonzero().squeeze(1)
        check_finite(score_N[row_J], *(None if array is None else array[row_J] for array in (sequence_N, position_N)))
    k = hard_count(hard_ratio, n)
    cut = find_cut(k, lambda level, key: these.sum_(histogram(part(), level, key)))
    kth = following = score_of(cut.key)
    if cut.ties == cut.equal:
        (least,) = these.largest([-least_above(part(), cut.key)])
        following = torch.inf if k == n else score_of(-least)
    index_K = torch.empty(k, dtype=torch.int64)
    filled = 0
    for row in hard_rows(pieces(score_N, label_N, slice(None)), cut, cut.ties):
        index_K[filled : filled + len(row)] = row
        filled += len(row)
    return Selection(index_K, quantile_threshold(kth, following, hard_ratio=hard_ratio, n=n))
