"""Token sequences of their own lengths.

Shape legend: B sequences, N tokens that are predicted, M = N + B ids, S predictions of the longest sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH_MULTIPLE = 8  # of a padded rectangle: attention over 127 tokens took longer than over 128
NO_LABEL = -100  # the label of a token that is only read, as transformers has it


@dataclass(frozen=True)
class TokenText:
    """One text as token ids, or a part of one.

    Attributes:
        labelled: which of them are learnt and measured, as many as ``ids``; None: all.
        goes_on: whether the next one is a further part of the same text. A part has no ``labelled``.
    """

    ids: Sequence[int]
    labelled: Sequence[bool] | None = None
    goes_on: bool = False


@dataclass(frozen=True)
class Sequences:
    """The sequences of a split, longest first, equal ones in the data's order: neighbours make even batches.

    Attributes:
        ids_M: int32, one sequence after another, each with the token that is only read before its first prediction.
        length_B: int64, predictions of each.
        labelled_N: bool, of every predicted token whether it counts; the others are context.
        rank_B: int64, place of each in the data's order.
    """

    ids_M: Tensor
    length_B: Tensor
    labelled_N: Tensor
    rank_B: Tensor

    @classmethod
    def from_lists(cls, ids: Sequence[Any], labelled: Sequence[Any] | None = None) -> "Sequences":
        """Of ids, ``n + 1`` a sequence, and which of the last ``n`` are labelled (None: all)."""
        arrays = [np.asarray(one, dtype=np.int32) for one in ids]
        marks = [np.ones(len(a) - 1, dtype=bool) for a in arrays] if labelled is None else [
            np.asarray(one, dtype=bool) for one in labelled
        ]  # fmt: skip
        lengths = np.asarray([len(one) - 1 for one in arrays], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        return cls(
            torch.from_numpy(np.concatenate([arrays[i] for i in order] or [np.empty(0, np.int32)])),
            torch.from_numpy(lengths[order]),
            torch.from_numpy(np.concatenate([marks[i] for i in order] or [np.empty(0, bool)])),
            torch.from_numpy(order.astype(np.int64)),
        )

    @classmethod
    def from_blocks(cls, ids_BT: Tensor) -> "Sequences":
        """Of equal blocks ``(B, S + 1)``, every token labelled."""
        blocks, width = ids_BT.shape
        return cls(
            ids_BT.to(torch.int32).flatten(),
            torch.full((blocks,), width - 1),
            torch.ones(blocks * (width - 1), dtype=torch.bool),
            torch.arange(blocks),
        )

    def __len__(self) -> int:
        return len(self.length_B)

    @property
    def tokens(self) -> int:
        """N, context included."""
        return len(self.labelled_N)

    @property
    def labels(self) -> int:
        """Tokens that count."""
        return int(self.labelled_N.sum())

    @property
    def longest(self) -> int:
        return int(self.length_B[0]) if len(self) else 0

    @property
    def start_B(self) -> Tensor:
        """Where each sequence's predictions begin among the N."""
        return self.length_B.cumsum(0) - self.length_B

    def ids(self, number: int) -> Tensor:
        """Of one sequence, ``(length + 1,)``."""
        start = int(self.start_B[number]) + number
        return self.ids_M[start : start + int(self.length_B[number]) + 1]

    def labelled(self, number: int) -> Tensor:
        """Of one sequence's predicted tokens, ``(length,)`` bool."""
        start = int(self.start_B[number])
        return self.labelled_N[start : start + int(self.length_B[number])]

    def blocks(self) -> Tensor:
        """``(B, S + 1)`` of sequences that are all of one length."""
        return self.ids_M.view(len(self), self.longest + 1)

    def first(self, count: int | None) -> "Sequences":
        """The first ``count`` in the data's order; None: all."""
        if count is None or count >= len(self):
            return self
        numbers = torch.argsort(self.rank_B)[:count].tolist()
        return Sequences.from_lists([self.ids(n) for n in numbers], [self.labelled(n) for n in numbers])

    def batches(self, tokens: int, *, equal: bool = False) -> Iterator[slice]:
        """Neighbours whose padded rectangle holds at most ``tokens``, one sequence at least.

        Args:
            equal: only sequences of one length, so that there is no padding.
        """
        lengths, first = self.length_B.tolist(), 0
        while first < len(lengths):
            end = min(first + max(1, tokens // self._width(lengths[first])), len(lengths))
            if equal:
                end = next((n for n in range(first, end) if lengths[n] != lengths[first]), end)
            yield slice(first, end)
            first = end

    def _width(self, longest: int) -> int:
        """Of a rectangle: what kernels like, but no wider than any sequence."""
        return min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.longest)

    def padded(self, picked: Tensor | slice) -> "PaddedIds":
        """Some sequences as a rectangle."""
        length_B, start_B = self.length_B[picked], self.start_B[picked]
        number_B = torch.arange(len(self))[picked]
        longest = int(length_B.max())
        width = longest if bool((length_B == longest).all()) else self._width(longest)
        column_T, column_S = torch.arange(width + 1), torch.arange(width)
        real_BT, real_BS = column_T <= length_B[:, None], column_S < length_B[:, None]
        place_BT = torch.where(real_BT, (start_B + number_B)[:, None] + column_T, 0)
        place_BS = torch.where(real_BS, start_B[:, None] + column_S, 0)
        ids_BT = torch.where(real_BT, self.ids_M[place_BT].long(), 0)
        return PaddedIds(ids_BT, real_BS, self.labelled_N[place_BS] & real_BS)

    def digest(self) -> bytes:
        """What tells these sequences from others."""
        lengths = self.length_B.unique()
        if len(lengths) <= 1 and bool(self.labelled_N.all()):  # equal blocks: as earlier versions wrote them
            width = int(lengths[0]) + 1 if len(lengths) else None
            head = f"({len(self)}, {width})" if width else f"{len(self)}"
            return head.encode() + self.ids_M.numpy().tobytes()
        arrays = (self.length_B, self.labelled_N, self.ids_M)
        return b"".join(array.numpy().tobytes() for array in arrays)


@dataclass(frozen=True)
class PaddedIds:
    """Sequences padded on the right: under a causal mask no token sees padding.

    Attributes:
        ids_BT: int64, ``T = S + 1``; 0 where there is none.
        real_BS: bool, of the predicted tokens: no padding.
        labelled_BS: bool, those that count.
    """

    ids_BT: Tensor
    real_BS: Tensor
    labelled_BS: Tensor

    @property
    def input_BS(self) -> Tensor:
        return self.ids_BT[:, :-1]

    @property
    def label_BS(self) -> Tensor:
        """``NO_LABEL`` where nothing is to be predicted."""
        return self.ids_BT[:, 1:].masked_fill(~self.labelled_BS, NO_LABEL)
