"""Attention of some tokens of a sequence to all of it: rotary positions, keys laid over others, masked softmax.

On a GPU scaled dot product attention does the work. On the CPU it is written out in batched products, grouped heads as
more queries of one key head, so that keys and values are never expanded: there SDPA with a mask takes 2.7 times as long
in float32 and 4 times in bfloat16.

Shape legend: K tokens that attend, B sequences, S sequence length, Q padded tokens that attend of each sequence,
H heads, G key/value heads, E head size, F = E / 2.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def additive(mask_B1QS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask is True, -inf elsewhere."""
    return torch.zeros(mask_B1QS.shape, dtype=dtype, device=mask_B1QS.device).masked_fill_(~mask_B1QS, -math.inf)


def grouped_attention(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask_B1QS: Tensor) -> Tensor:
    """``softmax(query @ key.T + mask) @ value``, ``(B, H, Q, E)``; key head g serves heads g H/G to (g+1) H/G - 1.

    Args:
        query_BHQE: already divided by ``sqrt(E)``.
        key_BGSE, value_BGSE: of the query's dtype. Contiguous, all three.
        mask_B1QS: what is added to the scores; of the same dtype, or bool: True where a query sees a key.
    """
    if query_BHQE.device.type != "cpu":
        # Expanded here: on older GPUs grouped attention falls to a kernel that holds all weights in memory.
        times = query_BHQE.shape[1] // key_BGSE.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query_BHQE,
            key_BGSE.repeat_interleave(times, dim=1),
            value_BGSE.repeat_interleave(times, dim=1),
            attn_mask=mask_B1QS,
            scale=1.0,
        )
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
