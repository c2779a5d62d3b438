"""The tokens a stage works on, handed out as its kind reads them: each for itself, or by whole sequences.

What an epoch shuffles and a batch is made of is a *unit*: a token, or a sequence with its hard tokens.

A batch is made in three steps. What it takes is listed: places in the stores, all of them numbers a token, made from
the stores' small arrays on the host. Then rows are gathered, where the stores are: in the host's memory or on the GPU.
Then what the stage reads is put together, on the stage's device. A GPU waits for none of that: a store on it gets the
lists of a whole epoch at once, and from a store in the host's memory a batch is gathered and sent while the one before
it is in use.

Sequences of a batch that are shorter than the longest share rows with others, as many as fit: one row is as long as
the longest, and no token sees another sequence.

Shape legend: K hard tokens, D hidden size, U units, C sequences of a batch, B rows that they are packed into, S tokens
of a row, L layers, G key/value heads, E head size; 2 is (key, value).
"""

import copy
import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.runtime.transfer import Tensors, send, send_ahead
from cascade_fast.stages.buckets import Bucket

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
        easy: the other tokens of these sequences, in the same places, where they go through the stage, too. The K then
            attend to what these leave there, and ``kv_BSL2GE`` is None.
    """

    hidden_KD: Tensor
    position_K: Tensor
    row_K: Tensor
    slot_K: Tensor
    queries: int
    kv_BSL2GE: Tensor | None
    shape: tuple[int, int]
    begin_K: Tensor | None = field(default=None, kw_only=True)
    easy: "SequencePack | None" = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> "SequencePack":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        easy = None if self.easy is None else self.easy.to(device)
        return dataclasses.replace(self, **moved, easy=easy)

    def padded_to(self, queries: int) -> "SequencePack":
        """The same with so many queries a row; no fewer than there are."""
        slot_K = self.slot_K + self.slot_K // self.queries * (queries - self.queries)
        return dataclasses.replace(self, slot_K=slot_K, queries=queries)

    def mask(self, begin: int = 0, end: int | None = None) -> Tensor:
        """``(B, 1, Q, S)`` bool: a query sees the keys of its sequence up to its own. Padding sees the first key, so
        that its softmax is finite; nobody reads its output. ``begin``, ``end``: of these queries alone."""
        rows, width = self.shape
        keys_S = torch.arange(width, device=self.position_K.device)

        def of_queries(of_K: Tensor) -> Tensor:
            of_BQ = of_K.new_zeros(rows * self.queries).index_copy(0, self.slot_K, of_K).view(rows, self.queries)
            return of_BQ[:, begin:end, None]

        if self.begin_K is None:
            seen = keys_S <= of_queries(self.position_K)
        else:
            seen = (keys_S <= of_queries(self.begin_K + self.position_K)) & (keys_S >= of_queries(self.begin_K))
        return seen[:, None]


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

    def in_buckets(self) -> "StageTokens":
        """The same in batches of few sizes: at the end some hold tokens that do not count."""
        return self

    def batch(self, picked: Tensor, device: torch.device) -> tuple[Any, Tensor]:
        """What the stage reads of the units ``picked``, here hidden states ``(K, D)``, and the labels ``(K,)``."""
        listed, size = self._listed(picked)
        (listed,) = send([listed], self.store.device)
        gathered = self._gathered(listed)
        if self.store.device.type != device.type:
            (gathered,) = send([gathered], device)
        return self._put_together(gathered, size)

    def batches(self, picks: Sequence[Tensor], device: torch.device) -> Generator[tuple[Any, Tensor], None, None]:
        """As :meth:`batch` for each of ``picks``, on the CPU or the GPU that the store is on or beside."""
        if device.type == "cpu":
            yield from (self.batch(picked, device) for picked in picks)
        elif self.store.device.type == "cpu":
            for gathered, size in send_ahead(self._listed_and_gathered, picks, device):
                yield self._put_together(gathered, size)
        else:
            lists, sizes = zip(*map(self._listed, picks), strict=True)
            for listed, size in zip(send(lists, device), sizes, strict=True):
                yield self._put_together(self._gathered(listed), size)

    def _listed_and_gathered(self, picked: Tensor) -> tuple[Tensors, Any]:
        listed, size = self._listed(picked)
        return self._gathered(listed), size

    def _listed(self, picked: Tensor) -> tuple[Tensors, Any]:
        """What the batch takes from where, on the CPU, and its size, as far as it is needed."""
        row_K = self.rows(picked)
        return {"row_K": row_K, "label_K": self.store["label"][row_K]}, None

    def _gathered(self, listed: Tensors) -> Tensors:
        """Of lists on the store's device: with rows in place of their numbers."""
        gathered = dict(listed)
        gathered["hidden_KD"] = _taken(self.store.hidden, gathered.pop("row_K"))
        return gathered

    def _put_together(self, gathered: Tensors, size: Any) -> tuple[Any, Tensor]:
        """On the stage's device: see :meth:`batch`."""
        return gathered["hidden_KD"], gathered["label_K"]


class PackSize(NamedTuple):
    """Of a pack: Q, B and S, and Q of its easy tokens, 0 where it has none."""

    queries: int
    rows: int
    width: int
    easy_queries: int = 0


class SequenceTokens(StageTokens):
    """Hard tokens that a stage takes with their sequences, to attend to them.

    Args:
        stores: the base's, with every token of its sequences, then what each stage so far has left, with the tokens
            that went through it. All have ``kv``; a later one's stands over those before it. Where every token is among
            ``index_K``, nobody reads them, and the base's may have none.
        index_K: rows of the hard tokens in the last store, ``(K,)`` int64, ascending, K >= 1.
        recompute: ``hidden (B, S, D), position (B, S) -> kv (B, S, L, 2, G, E)`` of the base, where its store has no
            ``kv``. Positions: None where each sequence has a row to itself.
        easy_too: whether the other tokens of the sequences go through the stage, too: see :attr:`SequencePack.easy`.
            Of the base's store alone; nobody then reads keys and values.
    """

    batches_differ = True

    def __init__(
        self,
        stores: Sequence[HiddenStore],
        index_K: Tensor,
        recompute: Recompute | None = None,
        *,
        easy_too: bool = False,
    ) -> None:
        super().__init__(stores[-1], index_K)
        self.stores = stores
        self.recompute = recompute
        self.easy_N = torch.ones(len(self.store), dtype=torch.bool).index_fill_(0, index_K, False) if easy_too else None
        self.bucketed = False
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

    def in_buckets(self) -> "SequenceTokens":
        if all(len(of_U.unique()) == 1 for of_U in (self.count_U, self.length_U)):  # packs have few sizes as they are
            return self
        made = copy.copy(self)
        made.bucketed = True
        return made

    def _listed(self, picked: Tensor) -> tuple[Tensors, PackSize]:
        row_K, count_C, length_C = self.rows(picked), self.count_U[picked], self.length_U[picked]
        places = PackPlaces.from_lengths(length_C)
        own_places = places.shared or self.bucketed
        before_C, queries = places.counted(count_C)
        bucket: Bucket | None = None
        if self.bucketed:
            bucket = Bucket.around(len(row_K), queries, places.rows, places.width)
            places, queries = dataclasses.replace(places, rows=bucket.rows, width=bucket.width), bucket.queries
        listed = self._listed_places(row_K, count_C, before_C, queries, places, own_places)
        listed["label_K"] = self.store["label"][row_K]
        if bucket is not None:
            listed = bucket.fill(listed)
        if self.easy_N is not None:
            row_N = _ranges(self.base_start_U[picked], length_C)
            row_J = row_N[self.easy_N[row_N]]
            before_C, easy_queries = places.counted(length_C - count_C)
            easy = self._listed_places(row_J, length_C - count_C, before_C, easy_queries, places, own_places)
            listed |= {f"easy {name}": of_J for name, of_J in easy.items()}
            return listed, PackSize(queries, places.rows, places.width, easy_queries)
        everyone = len(row_K) == int(length_C.sum())  # nobody then sees what the base has left
        if not everyone and ("kv" in self.stores[0] or self.recompute is not None):
            self._list_keys_and_values(listed, picked, places, own_places)
        return listed, PackSize(queries, places.rows, places.width)

    def _listed_places(
        self, row_K: Tensor, count_C: Tensor, before_C: Tensor, queries: int, places: "PackPlaces", own_places: bool
    ) -> Tensors:
        """Tokens of rows ``row_K``, ``count_C`` of each sequence, and where they stand: after the ``before_C`` of the
        sequences before them in their row. ``own_places``: whether a sequence may begin anywhere in a row."""
        position_K = self.store["position"][row_K].long()
        slot_K = (places.row_C * queries + before_C).repeat_interleave(count_C)
        listed = {
            "row_K": row_K,
            "position_K": position_K,
            "place_K": (places.row_C * places.width + places.column_C).repeat_interleave(count_C) + position_K,
            "slot_K": slot_K + _ranges(torch.zeros_like(count_C), count_C),
        }
        if own_places:
            listed["begin_K"] = places.column_C.repeat_interleave(count_C)
        return listed

    def _list_keys_and_values(self, listed: Tensors, picked: Tensor, places: "PackPlaces", own_places: bool) -> None:
        """Rows in the base's store of every place of the pack; of each later store, rows and the places they go to."""
        start_C, length_C = self.base_start_U[picked], self.length_U[picked]
        # Where nobody is, some token is taken: no query sees it.
        listed["source_N"] = places.laid_out(start_C, length_C, fill=int(start_C[0])).flatten()
        if self.recompute is not None and own_places:
            listed["position_BS"] = places.laid_out(torch.zeros_like(start_C), length_C, fill=0)
        first_C = places.row_C * places.width + places.column_C
        for number, store in enumerate(self.stores[1:], 1):
            start_C, count_C = _rows_of(store, self.sequence_U[picked])
            row_J = _ranges(start_C, count_C)
            listed[f"row_J of {number}"] = row_J
            listed[f"place_J of {number}"] = first_C.repeat_interleave(count_C) + store["position"][row_J]

    def _gathered(self, listed: Tensors) -> Tensors:
        gathered = super()._gathered(listed)
        if self.easy_N is not None:
            gathered["easy hidden_KD"] = _taken(self.store.hidden, gathered.pop("easy row_K"))
        if "source_N" not in gathered:
            return gathered
        base, *later = self.stores
        source_N = gathered.pop("source_N")
        for number, store in enumerate(later, 1):
            gathered[f"kv_J of {number}"] = _taken(store["kv"], gathered.pop(f"row_J of {number}"))
        if self.recompute is None:
            self._lay_over(gathered, _taken(base["kv"], source_N))
        else:
            gathered["source_ND"] = _taken(base.hidden, source_N)
        return gathered

    def _lay_over(self, gathered: Tensors, kv_NL2GE: Tensor) -> None:
        """Adds ``kv_NL2GE``, the base's, under what later exits have left."""
        if len(self.stores) > 1:
            kv_NL2GE = kv_NL2GE.to(self.stores[-1]["kv"].dtype)  # float16 to float32
        for number in range(1, len(self.stores)):
            kv_NL2GE[gathered.pop(f"place_J of {number}")] = gathered.pop(f"kv_J of {number}")
        gathered["kv_NL2GE"] = kv_NL2GE

    def _put_together(self, gathered: Tensors, size: PackSize) -> tuple[SequencePack, Tensor]:
        shape = (size.rows, size.width)
        if "source_ND" in gathered:
            assert self.recompute is not None
            hidden_BSD = gathered.pop("source_ND").unflatten(0, shape)
            made_BSL2GE = self.recompute(hidden_BSD, gathered.get("position_BS"))
            self._lay_over(gathered, made_BSL2GE.flatten(0, 1))
        kv_NL2GE = gathered.get("kv_NL2GE")
        kv_BSL2GE = None if kv_NL2GE is None else kv_NL2GE.unflatten(0, shape)
        easy = _pack(gathered, shape, size.easy_queries, whose="easy ") if size.easy_queries else None
        return _pack(gathered, shape, size.queries, kv_BSL2GE, easy=easy), gathered["label_K"]


def _pack(
    gathered: Tensors,
    shape: tuple[int, int],
    queries: int,
    kv_BSL2GE: Tensor | None = None,
    *,
    whose: str = "",
    easy: SequencePack | None = None,
) -> SequencePack:
    return SequencePack(
        gathered[f"{whose}hidden_KD"],
        gathered[f"{whose}position_K"],
        row_K=gathered[f"{whose}place_K"],
        slot_K=gathered[f"{whose}slot_K"],
        queries=queries,
        kv_BSL2GE=kv_BSL2GE,
        shape=shape,
        begin_K=gathered.get(f"{whose}begin_K"),
        easy=easy,
    )


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


def _taken(of_N: Tensor, index_K: Tensor) -> Tensor:
    """``of_N[index_K]``: numbers of 16 or 32 bit, any shape."""
    return ops.gather_rows(of_N.flatten(1), index_K)[0].unflatten(1, of_N.shape[1:])


def _rows_of(store: HiddenStore, sequence_C: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of sequences begin in a store, and how many there are."""
    start_C = torch.searchsorted(store["sequence"], sequence_C)
    return start_C, torch.searchsorted(store["sequence"], sequence_C, right=True) - start_C


def _ranges(start_B: Tensor, count_B: Tensor) -> Tensor:
    """``start[0], start[0] + 1, ...`` (count[0] of them), ``start[1], ...`` as one int64 tensor."""
    before_B = count_B.cumsum(0) - count_B
    return torch.arange(int(count_B.sum())) + (start_B - before_B).repeat_interleave(count_B)
