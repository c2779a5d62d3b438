"""The tokens a stage works on, handed out as its kind reads them: each for itself, or by whole sequences.

What an epoch shuffles and a batch is made of is a *unit*: a token, or a sequence with its hard tokens.

Sequences of a batch that are shorter than the longest share rows with others, as many as fit: one row is as long as
the longest, and no token sees another sequence.

Shape legend: K hard tokens, D hidden size, U units, C sequences of a batch, B rows that they are packed into, S tokens
of a row, L layers, G key/value heads, E head size; 2 is (key, value).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.base.hidden_store import HiddenStore

Recompute = Callable[[Tensor, Tensor | None], Tensor]  # of (B, S, D) and (B, S): see SequenceTokens


@dataclass(frozen=True)
class SequencePack:
    """Hard tokens of whole sequences, and what stands in these sequences for them to attend to.

    Attributes:
        hidden_KD: residual stream before the stage's first layer, float.
        position_K: true position, int64.
        row_K: ``row * S + column`` within the pack, int64.
        slot_K: ``row * Q + rank among the row's hard tokens``, int64: queries padded to Q a row.
        queries: Q.
        kv_BSL2GE: keys (rotated) and values of every token, as the exits before have left them; float. None: every
            token is among the K and has its own.
        shape: (B, S).
        begin_K: column at which the token's sequence begins, int64; None: each has a row to itself.
    """

    hidden_KD: Tensor
    position_K: Tensor
    row_K: Tensor
    slot_K: Tensor
    queries: int
    kv_BSL2GE: Tensor | None
    shape: tuple[int, int]
    begin_K: Tensor | None = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> "SequencePack":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return dataclasses.replace(self, **moved)

    def mask(self) -> Tensor:
        """``(B, 1, Q, S)`` bool: a query sees the keys of its sequence up to its own. Padding sees the first key, so
        that its softmax is finite; nobody reads its output."""
        rows, width = self.shape
        keys_S = torch.arange(width, device=self.position_K.device)

        def of_queries(of_K: Tensor) -> Tensor:
            return of_K.new_zeros(rows * self.queries).index_copy(0, self.slot_K, of_K)[:, None]

        if self.begin_K is None:
            seen = keys_S <= of_queries(self.position_K)
        else:
            seen = (keys_S <= of_queries(self.begin_K + self.position_K)) & (keys_S >= of_queries(self.begin_K))
        return seen.view(rows, 1, self.queries, width)


class StageTokens:
    """Hard tokens that a stage takes each for itself.

    Args:
        store: where they are.
        index_K: their rows, ``(K,)`` int64, ascending.
    """

    batches_differ = False  # in the size of what they hold, beyond the last one

    def __init__(self, store: HiddenStore, index_K: Tensor) -> None:
        self.store = store
        self.index_K = index_K

    def __len__(self) -> int:
        return self.index_K.shape[0]

    @property
    def units(self) -> int:
        return len(self)

    def units_of(self, tokens: int) -> int:
        """How many units hold about ``tokens`` tokens."""
        return tokens

    def chunks(self, tokens: int) -> Sequence[Tensor]:
        """All units in order, in parts of about ``tokens`` tokens."""
        return torch.arange(self.units).split(self.units_of(tokens))

    def count(self, picked: Tensor) -> int:
        """How many tokens the units ``picked`` hold."""
        return picked.shape[0]

    def rows(self, picked: Tensor) -> Tensor:
        """Rows in the store of the units' tokens."""
        return self.index_K[picked]

    def batch(self, picked: Tensor, device: torch.device) -> tuple[Tensor | SequencePack, Tensor]:
        """What the stage reads of the units ``picked``, here hidden states ``(K, D)``, and the labels ``(K,)``."""
        hidden_KD, (label_K,) = ops.gather_rows(self.store.hidden, self.rows(picked), (self.store["label"],))
        return hidden_KD.to(device, non_blocking=True), label_K.to(device, non_blocking=True)


class SequenceTokens(StageTokens):
    """Hard tokens that a stage takes with their sequences, to attend to them.

    Args:
        stores: the base's, with every token of its sequences, then what each stage so far has left, with the tokens
            that went through it. All have ``kv``; a later one's stands over those before it. Where every token is among
            ``index_K``, nobody reads them, and the base's may have none.
        index_K: rows of the hard tokens in the last store, ``(K,)`` int64, ascending, K >= 1.
        recompute: ``hidden (B, S, D), position (B, S) -> kv (B, S, L, 2, G, E)`` of the base, where its store has no
            ``kv``. Positions: None where each sequence has a row to itself.
    """

    batches_differ = True

    def __init__(self, stores: Sequence[HiddenStore], index_K: Tensor, recompute: Recompute | None = None) -> None:
        super().__init__(stores[-1], index_K)
        self.stores = stores
        self.recompute = recompute
        self.sequence_U, self.count_U = torch.unique_consecutive(self.store["sequence"][index_K], return_counts=True)
        self.start_U = self.count_U.cumsum(0) - self.count_U
        self.base_start_U, self.length_U = _rows_of(stores[0], self.sequence_U)

    @property
    def units(self) -> int:
        return self.sequence_U.shape[0]

    def units_of(self, tokens: int) -> int:
        return max(1, round(tokens * self.units / len(self)))

    def chunks(self, tokens: int) -> Sequence[Tensor]:
        """As :meth:`StageTokens.chunks`, none longer than as many sequences of mean length: they are sorted by it."""
        most = self.units_of(tokens) * self.length_U.double().mean().item()
        parts, first, held = list[Tensor](), 0, 0
        for unit, length in enumerate(self.length_U.tolist()):
            if unit > first and held + length > most:
                parts.append(torch.arange(first, unit))
                first, held = unit, 0
            held += length
        return [*parts, torch.arange(first, self.units)]

    def count(self, picked: Tensor) -> int:
        return int(self.count_U[picked].sum())

    def rows(self, picked: Tensor) -> Tensor:
        return self.index_K[_ranges(self.start_U[picked], self.count_U[picked])]

    def batch(self, picked: Tensor, device: torch.device) -> tuple[SequencePack, Tensor]:
        store, count_C = self.store, self.count_U[picked]
        hidden_KD, (label_K, position_K) = ops.gather_rows(
            store.hidden, self.rows(picked), (store["label"], store["position"])
        )
        position_K = position_K.long()
        places = PackPlaces.from_lengths(self.length_U[picked])
        # Ranks of hard tokens in their row: after those of the sequences before them there.
        before_C, queries = places.counted(count_C)
        slot_K = (places.row_C * queries + before_C).repeat_interleave(count_C)
        pack = SequencePack(
            hidden_KD,
            position_K,
            row_K=(places.row_C * places.width + places.column_C).repeat_interleave(count_C) + position_K,
            slot_K=slot_K + _ranges(torch.zeros_like(count_C), count_C),
            queries=queries,
            kv_BSL2GE=self._keys_and_values(picked, places),
            shape=(places.rows, places.width),
            begin_K=places.column_C.repeat_interleave(count_C) if places.shared else None,
        )
        return pack.to(device), label_K.to(device, non_blocking=True)

    def _keys_and_values(self, picked: Tensor, places: "PackPlaces") -> Tensor | None:
        """``(B, S, L, 2, G, E)``: of every token, what its latest exit has left."""
        base, *later = self.stores
        if "kv" not in base and self.recompute is None:
            return None
        start_C, length_C = self.base_start_U[picked], self.length_U[picked]
        # Where nobody is, some token is taken: no query sees it.
        source_BS = places.laid_out(start_C, length_C, fill=int(start_C[0]))
        if self.recompute is None:
            kv_BSL2GE = _taken(base["kv"], source_BS)
        else:
            position_BS = places.laid_out(torch.zeros_like(start_C), length_C, fill=0) if places.shared else None
            kv_BSL2GE = self.recompute(_taken(base.hidden, source_BS), position_BS)
        if later and later[-1]["kv"].dtype != kv_BSL2GE.dtype:
            kv_BSL2GE = kv_BSL2GE.to(later[-1]["kv"].dtype)  # float16 to float32
        kv_NL2GE = kv_BSL2GE.flatten(0, 1)
        first_C = places.row_C * places.width + places.column_C
        for store in later:
            start_C, count_C = _rows_of(store, self.sequence_U[picked])
            row_J = _ranges(start_C, count_C)
            kv_NL2GE[first_C.repeat_interleave(count_C) + store["position"][row_J]] = store["kv"][row_J]
        return kv_BSL2GE


@dataclass(frozen=True)
class PackPlaces:
    """Where the sequences of a batch stand in its pack.

    Attributes:
        row_C, column_C: of each sequence's first token, int64.
        rows, width: B and S; S is the length of the longest sequence.
    """

    row_C: Tensor
    column_C: Tensor
    rows: int
    width: int

    @classmethod
    def from_lengths(cls, length_C: Tensor) -> "PackPlaces":
        """Each sequence, the longest first, goes into the first row with room for it."""
        width = int(length_C.max())
        if int(length_C.min()) * 2 > width:  # no two fit into one
            row_C = torch.arange(len(length_C))
            return cls(row_C, torch.zeros_like(row_C), len(length_C), width)
        row_C, column_C = torch.empty_like(length_C), torch.empty_like(length_C)
        filled: list[int] = []
        for number in torch.argsort(length_C, descending=True, stable=True).tolist():
            length = int(length_C[number])
            row = next((r for r, used in enumerate(filled) if used + length <= width), len(filled))
            if row == len(filled):
                filled.append(0)
            row_C[number], column_C[number] = row, filled[row]
            filled[row] += length
        return cls(row_C, column_C, len(filled), width)

    @property
    def shared(self) -> bool:
        """Whether some row holds several sequences."""
        return self.rows < len(self.row_C)

    def counted(self, count_C: Tensor) -> tuple[Tensor, int]:
        """Of ``count_C`` things in each sequence: how many stand before its own in its row, and the most in a row."""
        in_row_B = count_C.new_zeros(self.rows).index_add_(0, self.row_C, count_C)
        if not self.shared:
            return torch.zeros_like(count_C), int(in_row_B.max())
        order = torch.argsort(self.row_C * self.width + self.column_C)
        before_C = torch.empty_like(count_C)
        before_C[order] = count_C[order].cumsum(0) - count_C[order]
        row_start_B = in_row_B.cumsum(0) - in_row_B
        return before_C - row_start_B[self.row_C], int(in_row_B.max())

    def laid_out(self, start_C: Tensor, length_C: Tensor, *, fill: int) -> Tensor:
        """``(B, S)`` int64: ``start, start + 1, ...`` where each sequence stands, ``fill`` elsewhere."""
        out = torch.full((self.rows * self.width,), fill)
        out[_ranges(self.row_C * self.width + self.column_C, length_C)] = _ranges(start_C, length_C)
        return out.view(self.rows, self.width)


def _taken(of_N: Tensor, index_BS: Tensor) -> Tensor:
    return of_N.index_select(0, index_BS.flatten()).unflatten(0, index_BS.shape)


def _rows_of(store: HiddenStore, sequence_C: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of sequences begin in a store, and how many there are."""
    start_C = torch.searchsorted(store["sequence"], sequence_C)
    return start_C, torch.searchsorted(store["sequence"], sequence_C, right=True) - start_C


def _ranges(start_B: Tensor, count_B: Tensor) -> Tensor:
    """``start[0], start[0] + 1, ...`` (count[0] of them), ``start[1], ...`` as one int64 tensor."""
    before_B = count_B.cumsum(0) - count_B
    return torch.arange(int(count_B.sum())) + (start_B - before_B).repeat_interleave(count_B)
