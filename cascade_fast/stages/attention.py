"""Attention of some tokens of a sequence to all of it: rotary positions, keys laid over others, masked softmax.

Grouped heads are more queries of one key head, so that keys and values are never expanded. On a GPU scaled dot product
attention does the work (:mod:`cascade_fast.stages.gpu_attention`). On the CPU ``ops.attention`` does; where keys and
values are wanted too, or not all scores are made at once, it is written out in batched products: SDPA with a mask took
2.7 times as long in float32 and 4 times in bfloat16.

Shape legend: K tokens that attend, B sequences, S sequence length, Q padded tokens that attend of each sequence,
H heads, G key/value heads, E head size, F = E / 2.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cascade_fast import ops
from cascade_fast.stages.gpu_attention import Masks, attention_by_group, folded_attention, padded_queries
from cascade_fast.stages.tokens import SequencePack

SCORE_BYTES = 8 * 2**20  # most scores that one product on the CPU makes: beyond, it goes by blocks of queries


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back; nothing of ``x`` is kept."""

    @staticmethod
    def forward(ctx, x_KHE: Tensor, cos_K1F: Tensor, sin_K1F: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos_K1F, sin_K1F)
        ctx.dtype = x_KHE.dtype
        return _rotated(x_KHE, cos_K1F, sin_K1F).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHE: Tensor):
        cos_K1F, sin_K1F = ctx.saved_tensors
        return _rotated(grad_KHE, cos_K1F, -sin_K1F).to(ctx.dtype), None, None, None


def _rotated(x_KHE: Tensor, cos_K1F: Tensor, sin_K1F: Tensor) -> Tensor:
    x_KHE = x_KHE.float()
    first_KHF, second_KHF = x_KHE.chunk(2, dim=-1)
    turned_KHE = x_KHE * torch.cat((cos_K1F, cos_K1F), dim=-1)
    # Neither out= nor value=: torch.compile breaks the graph at the one, and rounds the other in another way.
    turned_KHE[..., : first_KHF.shape[-1]].addcmul_(second_KHF, -sin_K1F)
    turned_KHE[..., first_KHF.shape[-1] :].addcmul_(first_KHF, sin_K1F)
    return turned_KHE


def rotate(x_KHE: Tensor, cos_K1F: Tensor, sin_K1F: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary positions (arXiv 2104.09864) as Llama has them, in float32, rounded once to ``dtype``.

    Args:
        x_KHE: ``(K, H, E)`` float.
        cos_K1F, sin_K1F: ``(K, 1, E / 2)`` float32, of each token's angles.
    """
    return _Rotate.apply(x_KHE, cos_K1F, sin_K1F, dtype)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pack stand among queries and keys, as ``ops.place_heads`` reads it.

    Attributes:
        slot_K, place_K: ``(K,)`` int64: the row of each token among ``B * Q`` queries, and among ``B * S`` keys.
        token_BQ, token_BS: int32: the token of each row; -1: none.
    """

    slot_K: Tensor
    place_K: Tensor
    token_BQ: Tensor
    token_BS: Tensor

    @classmethod
    def from_pack(cls, pack: SequencePack) -> "Places":
        (sequences, seq_len), tokens = pack.shape, pack.row_K.shape[0]
        token_K = torch.arange(tokens, dtype=torch.int32, device=pack.row_K.device)

        def tokens_of(index_K: Tensor, places: int) -> Tensor:
            return token_K.new_full((sequences * places,), -1).index_copy_(0, index_K, token_K).view(sequences, places)

        token_BQ, token_BS = tokens_of(pack.slot_K, pack.queries), tokens_of(pack.row_K, seq_len)
        return cls(pack.slot_K, pack.row_K, token_BQ, token_BS)


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs of a pack in every layer, made once. What moves are rows of one head, E numbers each.

    Attributes:
        kv_L2PE: keys and values of all tokens, ``P = B * G * S`` rows, in the dtype that attention computes in; where
            every token has its own, zeros, all of them one row in memory.
        kv_BGSE: the shape of one layer's keys.
        row_X: rows among P of the hard tokens' own, ``X = K * G``.
        slot_Y: rows among ``B * H * Q`` of their queries, ``Y = K * H``.
        queries: Q.
        key_angles, query_angles: cosine and sine ``(K, E / 2)``, float32; the query's divided by ``sqrt(E)``.
        at_once: whether all scores of a layer are made at once, forward and backward written out: on the CPU, where
            nobody wants the keys and values.
        mask_B1QS: see :func:`grouped_attention`; on the CPU, where all of it is used at once, what is to be added.
        places: of the tokens, where a GPU has kernels that place their heads and take them back; else None.
    """

    kv_L2PE: Tensor
    kv_BGSE: tuple[int, int, int, int]
    row_X: Tensor
    slot_Y: Tensor
    queries: int
    key_angles: tuple[Tensor, Tensor]
    query_angles: tuple[Tensor, Tensor]
    mask_B1QS: Tensor | Masks
    at_once: bool
    places: "Places | None" = None

    def over(self, key_KGE: Tensor, value_KGE: Tensor, beneath: "AttentionInputs") -> "AttentionInputs":
        """The same with one layer, in which other tokens' keys, not yet rotated, and values stand: those of the pack
        of ``beneath``, a pack of the same shape without keys and values of its own. No gradient reaches them."""
        as_it_is = key_KGE.new_empty(0, dtype=torch.float32)
        key_PE, value_PE = beneath.kv_L2PE[0]
        key_PE = ops.rotate_rows(key_KGE.detach(), *beneath.key_angles, beneath.row_X, key_PE)
        value_PE = ops.rotate_rows(value_KGE.detach(), as_it_is, as_it_is, beneath.row_X, value_PE)
        return replace(self, kv_L2PE=torch.stack((key_PE, value_PE))[None])

    @classmethod
    def from_pack(
        cls,
        pack: SequencePack,
        heads: int,
        kv_shape: tuple[int, int, int, int],
        cos_KE: Tensor,
        sin_KE: Tensor,
        *,
        leaves: bool,
    ) -> "AttentionInputs":
        """``leaves``: whether the tokens' keys and values are wanted, too."""
        (sequences, seq_len), device = pack.shape, pack.row_K.device
        if device.type != "cpu":
            pack = pack.padded_to(padded_queries(pack.queries))
        (layers, _, groups, size), queries = kv_shape, pack.queries
        computes = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        if pack.kv_BSL2GE is None:
            rows = sequences * groups * seq_len
            kv_L2PE = pack.hidden_KD.new_zeros(1, size, dtype=computes).expand(layers, 2, rows, size)
        else:
            kv_L2BGSE = pack.kv_BSL2GE.permute(2, 3, 0, 4, 1, 5).to(computes)
            kv_L2PE = kv_L2BGSE.reshape(*kv_L2BGSE.shape[:2], -1, size)
        sequence_K = pack.row_K // seq_len
        group_G, head_H = torch.arange(groups, device=device), torch.arange(heads, device=device)
        row_KG = ((sequence_K * groups)[:, None] + group_G) * seq_len + (pack.row_K % seq_len)[:, None]
        slot_KH = ((sequence_K * heads)[:, None] + head_H) * queries + (pack.slot_K % queries)[:, None]
        cos_KF, sin_KF = (angle_KE[:, : size // 2].float() for angle_KE in (cos_KE, sin_KE))
        fits = queries_at_once((sequences, heads), seq_len, computes.itemsize) >= queries
        mask_B1QS: Tensor | Masks
        if device.type != "cpu":
            mask_B1QS = Masks.from_pack(pack, heads // groups, computes)
        else:
            mask_B1QS = additive(pack.mask(), computes) if fits else pack.mask()
        return cls(
            kv_L2PE=kv_L2PE,
            kv_BGSE=(sequences, groups, seq_len, size),
            row_X=row_KG.flatten(),
            slot_Y=slot_KH.flatten(),
            queries=queries,
            key_angles=(cos_KF, sin_KF),
            query_angles=(cos_KF * size**-0.5, sin_KF * size**-0.5),
            mask_B1QS=mask_B1QS,
            at_once=device.type == "cpu" and fits and not leaves,
            places=Places.from_pack(pack) if device.type != "cpu" and ops.fused("place_heads", device) else None,
        )


def _placed(
    query_KHE: Tensor, key_KGE: Tensor, value_KGE: Tensor, inputs: AttentionInputs, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, of keys and of values, each ``(P, E)``: turned, and where attention wants them."""
    heads, size = query_KHE.shape[1:]
    rows = inputs.kv_BGSE[0] * heads * inputs.queries
    as_it_is = query_KHE.new_empty(0, dtype=torch.float32)
    room_PE = query_KHE.new_zeros(1, size).expand(rows, size)
    return (
        ops.rotate_rows(query_KHE, *inputs.query_angles, inputs.slot_Y, room_PE),
        ops.rotate_rows(key_KGE, *inputs.key_angles, inputs.row_X, inputs.kv_L2PE[layer, 0]),
        ops.rotate_rows(value_KGE, as_it_is, as_it_is, inputs.row_X, inputs.kv_L2PE[layer, 1]),
    )


class _Attend(torch.autograd.Function):
    """:func:`attend` on the CPU, forward and backward in operators of ours: for rotating and placing, for attention,
    and for taking back. Kept are queries, keys, values and weights."""

    @staticmethod
    def forward(ctx, query_KHE: Tensor, key_KGE: Tensor, value_KGE: Tensor, inputs: AttentionInputs, layer: int):
        sequences, groups, seq_len, size = inputs.kv_BGSE
        query_PE, key_PE, value_PE = _placed(query_KHE, key_KGE, value_KGE, inputs, layer)
        # The H / G heads of a group are (H / G) * Q queries of its one key head.
        query = query_PE.view(sequences * groups, -1, size)
        key, value = (of_PE.view(-1, seq_len, size) for of_PE in (key_PE, value_PE))
        assert isinstance(inputs.mask_B1QS, Tensor)
        attended, weights = ops.attention(query, key, value, inputs.mask_B1QS)
        ctx.save_for_backward(query, key, value, weights)
        ctx.inputs = inputs
        tokens, heads, _ = query_KHE.shape
        as_it_is = query_KHE.new_empty(0, dtype=torch.float32)
        return ops.rotate_rows_backward(attended.view(-1, size), as_it_is, as_it_is, inputs.slot_Y, heads, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHE: Tensor):
        query, key, value, weights = ctx.saved_tensors
        inputs: AttentionInputs = ctx.inputs
        assert isinstance(inputs.mask_B1QS, Tensor)
        (tokens, heads, size), rows = grad_KHE.shape, query.shape[0] * query.shape[1]
        as_it_is = grad_KHE.new_empty(0, dtype=torch.float32)
        room_PE = grad_KHE.new_zeros(1, size).expand(rows, size)
        grad = ops.rotate_rows(grad_KHE, as_it_is, as_it_is, inputs.slot_Y, room_PE).view(query.shape)
        grad_query, grad_key, grad_value = ops.attention_backward(grad, query, key, value, inputs.mask_B1QS, weights)
        groups = inputs.kv_BGSE[1]
        return (
            ops.rotate_rows_backward(grad_query.view(-1, size), *inputs.query_angles, inputs.slot_Y, heads, tokens),
            ops.rotate_rows_backward(grad_key.view(-1, size), *inputs.key_angles, inputs.row_X, groups, tokens),
            ops.rotate_rows_backward(grad_value.view(-1, size), as_it_is, as_it_is, inputs.row_X, groups, tokens),
            None,
            None,
        )


class _TakeRows(torch.autograd.Function):
    """The heads of tokens, ``(K, H, E)``, from their rows ``index`` of ``rows_PE``."""

    @staticmethod
    def forward(ctx, rows_PE: Tensor, index_Y: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(index_Y)
        ctx.rows = rows_PE.shape[0]
        as_it_is = rows_PE.new_empty(0, dtype=torch.float32)
        return ops.rotate_rows_backward(rows_PE, as_it_is, as_it_is, index_Y, heads, len(index_Y) // heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHE: Tensor):
        (index_Y,) = ctx.saved_tensors
        as_it_is = grad_KHE.new_empty(0, dtype=torch.float32)
        room_PE = grad_KHE.new_zeros(1, grad_KHE.shape[2]).expand(ctx.rows, -1)
        return ops.rotate_rows(grad_KHE, as_it_is, as_it_is, index_Y, room_PE), None, None


def attend(
    query_KHE: Tensor,
    key_KGE: Tensor,
    value_KGE: Tensor,
    inputs: AttentionInputs,
    layer: int,
    left: list[Tensor] | None = None,
) -> Tensor:
    """Rotary positions, the tokens' own keys and values laid over those that are there, attention to all of them: what
    the tokens have attended to, ``(K, H, E)``.

    Args:
        query_KHE, key_KGE, value_KGE: of one dtype, that of ``inputs.kv_L2PE``; with ``inputs.at_once`` there may be
            more of them than tokens, which stand nowhere.
        left: gets the tokens' keys (rotated) and values, ``(K, 2, G, E)``; not with ``inputs.at_once``.
    """
    if inputs.at_once:
        return _Attend.apply(query_KHE, key_KGE, value_KGE, inputs, layer)
    if inputs.places is not None:
        return _attend_from_places(query_KHE, key_KGE, value_KGE, inputs, inputs.places, layer, left)
    (sequences, groups, _, size), heads = inputs.kv_BGSE, query_KHE.shape[1]
    fused = query_KHE.device.type != "cpu" and ops.fused("rotate_rows", query_KHE.device)
    if fused:
        query_PE, key_PE, value_PE = _placed(query_KHE, key_KGE, value_KGE, inputs, layer)
        if left is not None:
            key_KGE = _TakeRows.apply(key_PE, inputs.row_X, groups)
    else:
        dtype = query_KHE.dtype
        (cos_KF, sin_KF), (key_cos_KF, key_sin_KF) = inputs.query_angles, inputs.key_angles
        query_KHE = rotate(query_KHE, cos_KF[:, None], sin_KF[:, None], dtype)
        key_KGE = rotate(key_KGE, key_cos_KF[:, None], key_sin_KF[:, None], dtype)
        room_PE = query_KHE.new_zeros(sequences * heads * inputs.queries, size)
        query_PE = ops.scatter_rows(query_KHE.flatten(0, 1), inputs.slot_Y, room_PE)
        key_PE = ops.scatter_rows(key_KGE.flatten(0, 1), inputs.row_X, inputs.kv_L2PE[layer, 0])
        value_PE = ops.scatter_rows(value_KGE.flatten(0, 1), inputs.row_X, inputs.kv_L2PE[layer, 1])
    if left is not None:
        left.append(torch.stack((key_KGE, value_KGE), dim=1))
    attended_BHQE = grouped_attention(
        query_PE.view(sequences, heads, inputs.queries, size),
        key_PE.view(inputs.kv_BGSE),
        value_PE.view(inputs.kv_BGSE),
        inputs.mask_B1QS,
    )
    if fused:
        return _TakeRows.apply(attended_BHQE.flatten(0, 2), inputs.slot_Y, heads)
    attended_YE, _ = ops.gather_rows(attended_BHQE.flatten(0, 2), inputs.slot_Y)
    return attended_YE.view(query_KHE.shape)


def _attend_from_places(
    query_KHE: Tensor,
    key_KGE: Tensor,
    value_KGE: Tensor,
    inputs: AttentionInputs,
    places: Places,
    layer: int,
    left: list[Tensor] | None,
) -> Tensor:
    """:func:`attend` where a GPU has the kernels: one places queries, keys and values, one takes back."""
    (sequences, _, _, size), heads, masks = inputs.kv_BGSE, query_KHE.shape[1], inputs.mask_B1QS
    times, (cos_KF, sin_KF), kv_2PE = heads // key_KGE.shape[1], inputs.key_angles, inputs.kv_L2PE[layer]
    query_BGRE, key_BGSE, value_BGSE = ops.place_heads(
        query_KHE, key_KGE, value_KGE, cos_KF, sin_KF, places.slot_K, places.place_K, places.token_BQ, places.token_BS,
        kv_2PE[0], kv_2PE[1], size**-0.5,
    )  # fmt: skip
    if left is not None:
        turned_KGE = ops.take_heads(key_BGSE, places.place_K, places.token_BS, 1)
        left.append(torch.stack((turned_KGE, value_KGE), dim=1))
    assert isinstance(masks, Masks)
    if masks.whole is not None:
        attended_BGRE = attention_by_group(query_BGRE, key_BGSE, value_BGSE, masks.whole)
    else:
        query_BHQE = query_BGRE.view(sequences, heads, inputs.queries, size)
        attended_BHQE = folded_attention(query_BHQE, key_BGSE, value_BGSE, masks)
        attended_BGRE = attended_BHQE.reshape(query_BGRE.shape)
    return ops.take_heads(attended_BGRE, places.slot_K, places.token_BQ, times)


def additive(mask_B1QS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask is True, -inf elsewhere."""
    return torch.zeros(mask_B1QS.shape, dtype=dtype, device=mask_B1QS.device).masked_fill_(~mask_B1QS, -math.inf)


def grouped_attention(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask_B1QS: Tensor | Masks) -> Tensor:
    """``softmax(query @ key.T + mask) @ value``, ``(B, H, Q, E)``; key head g serves heads g H/G to (g+1) H/G - 1.

    Args:
        query_BHQE: already divided by ``sqrt(E)``.
        key_BGSE, value_BGSE: of the query's dtype. Contiguous, all three.
        mask_B1QS: what is added to the scores; of the same dtype, or bool: True where a query sees a key. On a GPU
            those of :class:`Masks`.
    """
    if isinstance(mask_B1QS, Masks):
        return folded_attention(query_BHQE, key_BGSE, value_BGSE, mask_B1QS)
    step = queries_at_once(query_BHQE.shape, key_BGSE.shape[2], query_BHQE.element_size())
    if step >= query_BHQE.shape[2]:
        return _attend(query_BHQE, key_BGSE, value_BGSE, mask_B1QS)
    parts = zip(query_BHQE.split(step, dim=2), mask_B1QS.split(step, dim=2), strict=True)
    # A block's scores are made again in the backward pass: all of them would be Q x S.
    done = [checkpoint(_attend, q, key_BGSE, value_BGSE, m, use_reentrant=False) for q, m in parts]
    return torch.cat(done, dim=2)


def queries_at_once(query_shape: tuple[int, ...], seq_len: int, width: int) -> int:
    """Of each sequence, so that their scores of ``width`` bytes stay within ``SCORE_BYTES``; 1 at least."""
    return max(1, SCORE_BYTES // (query_shape[0] * query_shape[1] * seq_len * width))


def _attend(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask_B1QS: Tensor) -> Tensor:
    sequences, heads, queries, size = query_BHQE.shape
    groups, seq_len = key_BGSE.shape[1:3]
    if mask_B1QS.dtype == torch.bool:
        mask_B1QS = additive(mask_B1QS, query_BHQE.dtype)
    # The H / G heads of a group are (H / G) * Q queries of its one key head.
    query = query_BHQE.reshape(sequences * groups, heads // groups * queries, size)
    scores = torch.bmm(query, key_BGSE.flatten(0, 1).transpose(1, 2))
    # Softmax by head: of the scores by group, Inductor (PyTorch 2.13) takes all of this for attention without groups.
    weights_BHQS = scores.view(sequences, heads, queries, seq_len).add_(mask_B1QS).softmax(dim=-1)
    return torch.bmm(weights_BHQS.view(scores.shape), value_BGSE.flatten(0, 1)).view(query_BHQE.shape)
