"""Attention of a pack's queries on a GPU: torch's scaled dot product attention, by its memory-efficient kernel.

That kernel takes a mask from compute capability 7.5 on, but no grouped heads. So the T = H / G heads of a group are
T * Q queries of its one key head, and keys and values are not repeated.

Shape legend: B rows of a pack, S tokens of a row, Q queries, H heads, G key/value heads, T = H / G, E head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from cascade_fast.stages.tokens import SequencePack

MASK_BYTES = 32 * 2**20  # of a pack's mask at most: beyond, masks are made by blocks of queries and not kept
QUERIES = 16  # the number of queries is rounded up to a multiple of it: there are fewer shapes, and kernels like it
ALIGNED = 8  # SDPA copies a mask whose rows do not begin at a multiple of so many elements, in every call
# The math kernel is for what the other does not take, as a head size that is no multiple of 8 in float16. Not cuDNN's,
# which makes a plan for every shape of a pack.
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def padded_queries(queries: int) -> int:
    """Q, rounded up for a GPU."""
    return rounded_up(queries, QUERIES)


def rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Masks:
    """The masks of a pack: all of it made once, or one for each block of queries whenever it is needed.

    Attributes:
        pack: with Q as :func:`padded_queries` has it.
        times: T.
        dtype: that attention computes in.
        step: queries of a block; Q if all go at once.
        whole: what is added to the scores of all queries, ``(B, 1, T * Q, S)``; None where they go by blocks.
    """

    pack: SequencePack
    times: int
    dtype: torch.dtype
    step: int
    whole: Tensor | None

    @classmethod
    def from_pack(cls, pack: SequencePack, times: int, dtype: torch.dtype) -> "Masks":
        step = queries_of_mask(pack.shape, times, dtype.itemsize)
        whole = added_to_scores(pack.mask(), times, dtype) if step >= pack.queries else None
        return cls(pack, times, dtype, min(step, pack.queries), whole)

    def of_block(self, begin: int) -> Tensor:
        return added_to_scores(self.pack.mask(begin, begin + self.step), self.times, self.dtype)


def queries_of_mask(shape: tuple[int, int], times: int, width: int) -> int:
    """So many queries of each of B rows of S tokens, ``shape``, have a mask of at most ``MASK_BYTES``, ``width`` bytes
    a number; a multiple of ``QUERIES``, and not 0."""
    rows, seq_len = shape
    fit = MASK_BYTES // (rows * times * rounded_up(seq_len, ALIGNED) * width)
    return max(1, fit // QUERIES) * QUERIES


def added_to_scores(mask_B1QS: Tensor, times: int, dtype: torch.dtype) -> Tensor:
    """``(B, 1, T * Q, S)``: 0 where the bool mask is True, -inf elsewhere, for each head of a group; rows aligned."""
    rows, _, queries, seq_len = mask_B1QS.shape
    room = torch.full(
        (rows, times, queries, rounded_up(seq_len, ALIGNED)), -torch.inf, dtype=dtype, device=mask_B1QS.device
    )
    return room[..., :seq_len].masked_fill_(mask_B1QS, 0.0).flatten(1, 2)[:, None]


def folded_attention(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, masks: Masks) -> Tensor:
    """``softmax(query @ key.T + mask) @ value``, ``(B, H, Q, E)``; key head g serves heads g H/G to (g+1) H/G - 1.

    Args:
        query_BHQE: already divided by ``sqrt(E)``, of the dtype of ``masks``; so are the others.
    """
    if masks.whole is not None:
        return _attend(query_BHQE, key_BGSE, value_BGSE, masks.whole)

    def of_block(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, begin: int) -> Tensor:
        return _attend(query_BHQE, key_BGSE, value_BGSE, masks.of_block(begin))

    # A block's mask is made again in the backward pass: all of them would be Q x S.
    done = [
        checkpoint(of_block, q, key_BGSE, value_BGSE, n * masks.step, use_reentrant=False, preserve_rng_state=False)
        for n, q in enumerate(query_BHQE.split(masks.step, dim=2))
    ]
    return torch.cat(done, dim=2)


def _attend(query_BHQE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask_B1RS: Tensor) -> Tensor:
    """``mask_B1RS``: of R = T * Q queries a group."""
    folded_BGRE = query_BHQE.reshape(*key_BGSE.shape[:2], -1, query_BHQE.shape[-1])
    return attention_by_group(folded_BGRE, key_BGSE, value_BGSE, mask_B1RS).reshape(query_BHQE.shape)


def attention_by_group(query_BGRE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, mask_B1RS: Tensor) -> Tensor:
    """The same of R = T * Q queries a group, ``(B, G, R, E)``, in whatever order in memory."""
    with sdpa_kernel(BACKENDS):
        return torch.nn.functional.scaled_dot_product_attention(
            query_BGRE, key_BGSE, value_BGSE, attn_mask=mask_B1RS, scale=1.0
        )
