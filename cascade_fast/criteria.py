"""What makes a token hard: the criteria, by name. A score is low where a token is hard, whatever the criterion.

A criterion is ``f(h_in_ND, h_out_ND, *, logits=None) -> (N,)`` scores. ``logits`` are handed on as the caller gave
them, ``(N, V)`` or ``(B, S, V)`` with ``B * S = N``: flattening those of ``logits[:, :-1]`` would copy them all.

Shape legend: N tokens, D hidden size, B sequences, S sequence length, V vocabulary.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.losses import chunk_tokens

Criterion = Callable[..., Tensor]

CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator: the function can be asked for by ``name`` from here on.

    Raises:
        ValueError: an empty name, or one that is taken.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: {name!r}; must be a string that is not empty")
    if name in CRITERIA:
        raise ValueError(f"name: {name!r}; must not be taken (there are {', '.join(map(repr, CRITERIA))})")

    def register(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return register


def get_criterion(criterion: str | Criterion) -> Criterion:
    """The function of that name; a callable is returned as it is.

    Raises:
        ValueError: neither a registered name nor a callable.
    """
    if callable(criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(f"criterion: {criterion!r}; must be a callable or one of {', '.join(map(repr, CRITERIA))}")
    return CRITERIA[criterion]


def score_tokens(
    criterion: str | Criterion,
    h_in_ND: Tensor,
    h_out_ND: Tensor,
    *,
    logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The scores of N tokens, low = hard, with the shape and dtype checked.

    Args:
        criterion: a registered name, or a callable as described above.
        h_in_ND, h_out_ND: ``(N, D)`` hidden states before and after the model.
        logits: ``(N, V)`` or ``(B, S, V)``, for the criteria that read them.
        backend: of ``"cosine"``, the criterion that is an operator of :mod:`cascade_fast.ops`.

    Returns:
        ``(N,)`` float32.

    Raises:
        ValueError: an unknown criterion, missing logits, or a criterion that does not return N float scores.
    """
    function = get_criterion(criterion)
    options = {"backend": backend} if function is cosine else {}
    score_N = function(h_in_ND, h_out_ND, logits=logits, **options)
    n = h_out_ND.shape[0]
    if not isinstance(score_N, Tensor) or score_N.shape != (n,) or not score_N.is_floating_point():
        got = f"{tuple(score_N.shape)} {score_N.dtype}" if isinstance(score_N, Tensor) else repr(type(score_N))
        raise ValueError(f"criterion: {criterion!r} returned {got}; must return a float tensor of shape ({n},)")
    if score_N.device != h_out_ND.device:
        raise ValueError(f"criterion: {criterion!r} returned scores on {score_N.device}; must be on {h_out_ND.device}")
    return score_N.float()


@register_criterion("cosine")
def cosine(h_in_ND: Tensor, h_out_ND: Tensor, *, logits: Tensor | None = None, backend: str = "auto") -> Tensor:
    """``<h_in, h_out> / (|h_in| |h_out| + 1e-8)``: low where the model changed the token a lot. Differentiable."""
    return ops.cosine_score(h_in_ND, h_out_ND, backend=backend)


@register_criterion("entropy")
def negative_entropy(h_in_ND: Tensor, h_out_ND: Tensor, *, logits: Tensor | None = None) -> Tensor:
    """Minus the entropy of the logits: low where the model is unsure. No gradient."""
    if logits is None:
        raise ValueError("logits: None; criterion 'entropy' needs the logits of every token, (N, V) or (B, S, V)")
    return -token_entropy(logits)


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of ``softmax(logits)`` in nats, of every token; a vocabulary entry at -inf adds nothing.

    Args:
        logits: ``(..., V)`` float, any strides. Turned into float32 a chunk of tokens at a time, so no second array
            of their size is made.

    Returns:
        ``(N,)`` float32, N the product of the leading dimensions.
    """
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[:-1].numel(), dtype=torch.float32)
    if logits.dim() > 2:  # one sequence at a time: each is a view, while flattening all of them may be a copy
        return torch.cat([token_entropy(part) for part in logits])
    chunks = logits.split(chunk_tokens(logits.shape[-1], torch.float32))
    # entr(p) = -p log p, and 0 at p = 0.
    return torch.cat([torch.special.entr(chunk_CV.float().softmax(-1)).sum(-1) for chunk_CV in chunks])


def random_scores(sequence_N: Tensor, position_N: Tensor, *, seed: int, split: str, stage: int = 0) -> Tensor:
    """Uniform noise in [0, 1), the score of the criterion ``random``: what hard tokens are compared with.

    A hash of the arguments (SplitMix64, Steele et al. 2014, doi 10.1145/2660193.2660195), token by token: it does not
    depend on what else is in a batch.

    Args:
        sequence_N, position_N: ``(N,)`` integers in [0, 2^31): where the token is.
        seed: the run's.
        split: name of the split.
        stage: whose output is scored; 0 for the base.

    Returns:
        ``(N,)`` float32 on the CPU.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {split} {stage}".encode()).digest()[:8], "little", signed=True)
    state_N = (sequence_N.cpu().long() << 32 | position_N.cpu().long()) * -0x61C8864680B583EB + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        state_N = (state_N ^ _shifted(state_N, shift)) * factor
    state_N = state_N ^ _shifted(state_N, 31)
    return _shifted(state_N, 40).float() / 2**24  # the upper 24 bits, all that float32 holds


def _shifted(state_N: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int64 as if it had no sign."""
    return (state_N >> bits) & ((1 << (64 - bits)) - 1)
