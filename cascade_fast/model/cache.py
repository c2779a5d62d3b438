"""What a second look attends to in generation: the stages' keys and values, kept as more layers of the base's cache.

With ``n`` layers of the base and stages of ``L``, layers ``n + (k - 1) L`` to ``n + k L - 1`` of transformers'
``DynamicCache`` are stage k's: its own keys and values at tokens that it has run on, and at all others what stands in
those of the exit before, the base's last L to begin with. All layers are of one length, so that whatever transformers
does to a cache between two steps (reordering for beams, cropping after a draft, repeating) it does to them, too.

Shape legend: B sequences, P tokens in the cache before the forward pass, S new ones, T = P + S; N = B * S, K of them
in a stage; U sequences with a token in the stage, Q most tokens of one; L layers, D hidden size, G key/value heads,
E head size; 2 is (key, value).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from cascade_fast.input_checks import InputError
from cascade_fast.stages.tokens import SequencePack


def open_cache(
    cache: Cache | None, base_config: Any, new: int, position_ids: Tensor | None, attention_mask: Tensor | None
) -> DynamicCache:
    """``cache``, ready to hold a cascade's layers, or a new one, before a forward pass over ``new`` tokens a sequence.

    Raises:
        InputError: more tokens than the base attends to.
        ValueError: a cache of another kind than transformers' default, or a row that is not one text.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: {attention_mask.dim()} dimensions; a second look needs (B, past + S)")
    told = position_ids if attention_mask is None else None
    if told is not None and told.shape[-1] > 1 and (told.diff(dim=-1) != 1).any():
        raise ValueError("position_ids: not one text a row; a second look needs that, or an attention_mask")
    if cache is None:
        cache = DynamicCache()  # without a configuration: no layer forgets what has left a sliding window
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise ValueError(f"cache: {type(cache).__name__}; a second look needs a DynamicCache, not offloaded")
    if any(cache.is_sliding):
        if cache.get_seq_length() > 0:
            raise ValueError("cache: forgets what has left the sliding window; pass DynamicCache()")
        cache.layers = [DynamicLayer() for _ in cache.layers]
    tokens, window = cache.get_seq_length() + new, getattr(base_config, "sliding_window", None)
    if window is not None and tokens > window:
        raise InputError(
            f"input_ids: {tokens} tokens with those in the cache; the base attends to the last {window} only, which a "
            f"second look does not: must be at most {window}"
        )
    return cache


@dataclass(frozen=True)
class CachedPack(SequencePack):
    """A pack whose tokens stand in other places than their positions say: after padding, or after those in a cache.

    Attributes:
        row_K: ``sequence * T + column`` instead of the position.
        column_K: place of a token among its sequence's keys, int64.
        attended_UT: keys that are no padding, bool; None: all.
    """

    column_K: Tensor
    attended_UT: Tensor | None = None

    def mask(self, begin: int = 0, end: int | None = None) -> Tensor:
        sequences, keys = self.shape
        column_P = self.column_K.new_zeros(sequences * self.queries).index_copy(0, self.slot_K, self.column_K)
        column_UQ1 = column_P.view(sequences, self.queries, 1)[:, begin:end]
        key_T = torch.arange(keys, device=column_P.device)
        mask_UQT = key_T <= column_UQ1
        if self.attended_UT is not None:
            mask_UQT &= self.attended_UT[:, None]
            mask_UQT |= key_T == column_UQ1  # where nobody is: one key, so that the softmax is finite
        return mask_UQT[:, None]


class StageContext:
    """What the stages attend to in one forward pass, and where they leave theirs.

    Args:
        cache: with the base's keys and values of T tokens a sequence, and the stages' of P.
        base_layers, stages, depth: how many layers the base has, how many stages there are, and L.
        shape: (B, S).
        position_ids: true positions of the new tokens, (B or 1, S) int64; None: their places.
        attention_mask: (B, T), 0 for padding; None: there is none.

    Raises:
        ValueError: the base has left nothing in the cache, as where its gradients are checkpointed.
    """

    def __init__(
        self,
        cache: DynamicCache,
        *,
        base_layers: int,
        stages: int,
        depth: int,
        shape: tuple[int, int],
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        self.cache, self.base_layers, self.depth = cache, base_layers, depth
        (self.batch, self.new), self.total = shape, cache.get_seq_length()
        if self.total < self.new:
            raise ValueError("cache: the base kept none (gradient checkpointing?); a second look reads them")
        self.position_ids = None if position_ids is None else position_ids.expand(shape).flatten()
        self.attended_BT = None if attention_mask is None else attention_mask.bool()
        while len(cache.layers) < base_layers + stages * depth:
            cache.layers.append(DynamicLayer())
        self.extended = base_layers  # layers that hold the new tokens already

    def pack(self, stage: int, hidden_KD: Tensor, token_K: Tensor) -> CachedPack:
        """Tokens ``token_K`` (rows of the N new ones, ascending) for ``stage`` (from 1), and what is before them."""
        self._extend(stage)
        sequence_K, column_K = self._place(token_K)
        count_B = token_K.new_zeros(self.batch).index_add_(0, sequence_K, torch.ones_like(token_K))
        sequences, queries = self._sizes(count_B, len(token_K))
        rank_K = torch.arange(len(token_K), device=token_K.device) - (count_B.cumsum(0) - count_B)[sequence_K]
        picked: slice | Tensor = slice(None)
        place_K = sequence_K
        if sequences < self.batch:  # the others' keys are read by nobody
            picked = torch.nonzero_static(count_B, size=sequences).squeeze(1)
            place_K = ((count_B > 0).cumsum(0) - 1)[sequence_K]
        layers: list[Any] = self._layers(stage)
        kv_UL2GTE = torch.stack([torch.stack((kept.keys[picked], kept.values[picked]), 1) for kept in layers], 1)
        return CachedPack(
            hidden_KD,
            column_K if self.position_ids is None else self.position_ids[token_K],
            row_K=place_K * self.total + column_K,
            slot_K=place_K * queries + rank_K,
            queries=queries,
            kv_BSL2GE=kv_UL2GTE.permute(0, 4, 1, 2, 3, 5),
            shape=(kv_UL2GTE.shape[0], kv_UL2GTE.shape[4]),
            column_K=column_K,
            attended_UT=None if self.attended_BT is None else self.attended_BT[picked],
        )

    def _sizes(self, count_B: Tensor, tokens: int) -> tuple[int, int]:
        """U and Q. The host waits for the device only where it cannot know: with several tokens of several texts."""
        if self.new == 1:
            return tokens, 1
        if self.batch == 1:
            return 1, tokens
        sequences, queries = torch.stack((count_B.count_nonzero(), count_B.max())).tolist()
        return sequences, queries

    def leave(self, stage: int, token_K: Tensor, kv_KL2GE: Tensor) -> None:
        """Keys and values that ``stage`` has made of its tokens, for the tokens after them and the stages behind it."""
        sequence_K, column_K = self._place(token_K)
        layers: list[Any] = self._layers(stage)
        for kept, kv_K2GE in zip(layers, kv_KL2GE.unbind(1), strict=True):
            kept.keys[sequence_K, :, column_K] = kv_K2GE[:, 0].to(kept.keys.dtype)
            kept.values[sequence_K, :, column_K] = kv_K2GE[:, 1].to(kept.values.dtype)

    def close(self) -> DynamicCache:
        """The cache, with the new tokens in the layers of every stage, run or not."""
        self._extend((len(self.cache.layers) - self.base_layers) // self.depth)
        return self.cache

    def _extend(self, stage: int) -> None:
        """The new tokens' keys and values up to ``stage``'s layers, as the exits before it have left them."""
        layers: list[Any] = self.cache.layers
        end = self.base_layers + stage * self.depth
        for kept, before in zip(layers[self.extended : end], layers[self.extended - self.depth :], strict=False):
            have = kept.get_seq_length()
            kept.update(before.keys[:, :, have:], before.values[:, :, have:])
        self.extended = max(self.extended, end)

    def _layers(self, stage: int) -> list[Any]:
        first = self.base_layers + (stage - 1) * self.depth
        return self.cache.layers[first : first + self.depth]

    def _place(self, token_K: Tensor) -> tuple[Tensor, Tensor]:
        """Sequence, and place among its T tokens."""
        return token_K // self.new, self.total - self.new + token_K % self.new
