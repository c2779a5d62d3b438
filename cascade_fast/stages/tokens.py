"""The tokens a stage works on, handed out as its kind reads them: each for itself, or by whole sequences.

What an epoch shuffles and a batch is made of is a *unit*: a token, or a sequence with its hard tokens.

Shape legend: K hard tokens, D hidden size, U units, B sequences of a batch, S sequence length, L layers, G key/value
heads, E head size; 2 is (key, value).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.base.hidden_store import HiddenStore


@dataclass(frozen=True)
class SequencePack:
    """Hard tokens of whole sequences, and what stands in these sequences for them to attend to.

    Attributes:
        hidden_KD: residual stream before the stage's first layer, float.
        position_K: true position, int64.
        row_K: ``sequence * S + position`` within the pack, int64, ascending.
        slot_K: ``sequence * Q + rank among the sequence's hard tokens``, int64: queries padded to Q a sequence.
        queries: Q.
        kv_BSL2GE: keys (rotated) and values of every token, as the exits before have left them; float.
    """

    hidden_KD: Tensor
    position_K: Tensor
    row_K: Tensor
    slot_K: Tensor
    queries: int
    kv_BSL2GE: Tensor

    def to(self, device: torch.device) -> "SequencePack":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return dataclasses.replace(self, **moved)

    def mask(self) -> Tensor:
        """``(B, 1, Q, S)`` bool: a query sees the keys up to its own position. Padding sees the first key, so that
        its softmax is finite; nobody reads its output."""
        sequences, seq_len = self.kv_BSL2GE.shape[:2]
        position = self.position_K.new_zeros(sequences * self.queries).index_copy(0, self.slot_K, self.position_K)
        keys_S = torch.arange(seq_len, device=position.device)
        return (keys_S <= position[:, None]).view(sequences, 1, self.queries, seq_len)


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
            that went through it. All have ``kv``; a later one's stands over those before it.
        index_K: rows of the hard tokens in the last store, ``(K,)`` int64, ascending, K >= 1.
        recompute: ``hidden (B, S, D) -> kv (B, S, L, 2, G, E)`` of the base, where its store has no ``kv``.
    """

    batches_differ = True

    def __init__(
        self, stores: Sequence[HiddenStore], index_K: Tensor, recompute: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(stores[-1], index_K)
        self.stores = stores
        self.recompute = recompute
        self.seq_len = int(stores[0]["position"][-1]) + 1
        self.sequence_U, self.count_U = torch.unique_consecutive(self.store["sequence"][index_K], return_counts=True)
        self.start_U = self.count_U.cumsum(0) - self.count_U

    @property
    def units(self) -> int:
        return self.sequence_U.shape[0]

    def units_of(self, tokens: int) -> int:
        return max(1, round(tokens * self.units / len(self)))

    def count(self, picked: Tensor) -> int:
        return int(self.count_U[picked].sum())

    def rows(self, picked: Tensor) -> Tensor:
        return self.index_K[_ranges(self.start_U[picked], self.count_U[picked])]

    def batch(self, picked: Tensor, device: torch.device) -> tuple[SequencePack, Tensor]:
        store, count_B = self.store, self.count_U[picked]
        hidden_KD, (label_K, position_K) = ops.gather_rows(
            store.hidden, self.rows(picked), (store["label"], store["position"])
        )
        position_K = position_K.long()
        sequence_K = torch.arange(len(picked)).repeat_interleave(count_B)
        rank_K = _ranges(torch.zeros_like(count_B), count_B)
        queries = int(count_B.max())
        pack = SequencePack(
            hidden_KD,
            position_K,
            row_K=sequence_K * self.seq_len + position_K,
            slot_K=sequence_K * queries + rank_K,
            queries=queries,
            kv_BSL2GE=self._keys_and_values(self.sequence_U[picked]),
        )
        return pack.to(device), label_K.to(device, non_blocking=True)

    def _keys_and_values(self, sequence_B: Tensor) -> Tensor:
        """``(B, S, L, 2, G, E)``: of every token, what its latest exit has left."""
        base, *later = self.stores
        block_B = (sequence_B - base["sequence"][0]).long()
        if self.recompute is None:
            kv_BSL2GE = base["kv"].unflatten(0, (-1, self.seq_len))[block_B]
        else:
            kv_BSL2GE = self.recompute(base.hidden.unflatten(0, (-1, self.seq_len))[block_B])
        if later and later[-1]["kv"].dtype != kv_BSL2GE.dtype:
            kv_BSL2GE = kv_BSL2GE.to(later[-1]["kv"].dtype)  # float16 to float32
        kv_NL2GE = kv_BSL2GE.flatten(0, 1)
        for store in later:
            start_B = torch.searchsorted(store["sequence"], sequence_B)
            count_B = torch.searchsorted(store["sequence"], sequence_B, right=True) - start_B
            row_J = _ranges(start_B, count_B)
            place_J = torch.arange(len(sequence_B)).repeat_interleave(count_B) * self.seq_len + store["position"][row_J]
            kv_NL2GE[place_J] = store["kv"][row_J]
        return kv_BSL2GE


def _ranges(start_B: Tensor, count_B: Tensor) -> Tensor:
    """``start[0], start[0] + 1, ...`` (count[0] of them), ``start[1], ...`` as one int64 tensor."""
    before_B = count_B.cumsum(0) - count_B
    return torch.arange(int(count_B.sum())) + (start_B - before_B).repeat_interleave(count_B)
