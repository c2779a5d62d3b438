"""What makes a token hard: the criteria. A score is low where a token is hard, whatever the criterion.

A :class:`Criterion` is all that anybody asks of one: its name, what its scores are in words, whether it needs logits,
and the scores themselves. :func:`register_criterion` adds to them.

Shape legend: N tokens, D hidden size, B sequences, S sequence length, V vocabulary, C tokens of a chunk.
"""

import hashlib
import inspect
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cascade_fast import ops, settings
from cascade_fast.losses import chunk_tokens, token_losses

BAND_NATS = 2.5  # entropy at the middle of the criterion ``band``


@dataclass(frozen=True, eq=False)
class Places:
    """Where N tokens of a run are.

    Attributes:
        sequence_N, position_N: ``(N,)`` integers in [0, 2^31).
        seed: the run's.
        split: name of the split.
        stage: whose output is scored; 0 for the base.
    """

    sequence_N: Tensor
    position_N: Tensor
    seed: int
    split: str
    stage: int = 0


@dataclass(frozen=True, eq=False)
class TokensAtExit:
    """What is known of N tokens at an exit.

    Attributes:
        before_ND, after_ND: ``(N, D)`` hidden states that went in and that came out.
        logits: ``(N, V)`` or ``(B, S, V)`` with ``B * S = N``: flattening those of ``logits[:, :-1]`` would copy them
            all. None where nobody has made them.
        entropy_N: ``(N,)`` float32 of the logits, where it is known already.
        places: where the tokens are; None outside of a run.
        backend: of the operators of :mod:`cascade_fast.ops`.
    """

    before_ND: Tensor
    after_ND: Tensor
    logits: Tensor | None = None
    entropy_N: Tensor | None = None
    places: Places | None = None
    backend: str = "auto"


@dataclass(frozen=True, eq=False)
class Criterion:
    """What makes a token hard.

    Attributes:
        name: under which it is registered, the value of ``--criterion``.
        label: what a token's score is, in words, for tables and plots.
        function: the scores of tokens, ``(N,)`` float; see :meth:`score`, which checks them.
        needs_logits: False where it reads hidden states or places alone, so that no logits need be made.
        for_models: False for a baseline of training that no model can be run by.
        base_pass_of: name of the criterion whose base pass serves this one too, whose scores go by places alone.
        code: SHA-256 of its code, where that is not this package's: scores are kept for later runs.
        operator: the operator of :mod:`cascade_fast.ops` that computes it, if one does.
    """

    name: str
    label: str
    function: Callable[[TokensAtExit], Tensor]
    needs_logits: bool = False
    for_models: bool = True
    base_pass_of: str | None = None
    code: str | None = None
    operator: str | None = None

    @property
    def in_base_pass(self) -> "Criterion":
        """The one whose scores the base pass keeps."""
        return self if self.base_pass_of is None else CRITERIA[self.base_pass_of]

    def score(self, tokens: TokensAtExit) -> Tensor:
        """``(N,)`` float32, low = hard.

        Raises:
            ValueError: missing logits, or a function that does not return N float scores on the tokens' device.
        """
        if self.needs_logits and tokens.logits is None:
            raise ValueError(
                f"logits: None; criterion {self.name!r} needs the logits of every token, (N, V) or (B, S, V)"
            )
        score_N = self.function(tokens)
        n, device = tokens.after_ND.shape[0], tokens.after_ND.device
        if not isinstance(score_N, Tensor) or score_N.shape != (n,) or not score_N.is_floating_point():
            got = f"{tuple(score_N.shape)} {score_N.dtype}" if isinstance(score_N, Tensor) else repr(type(score_N))
            raise ValueError(f"criterion: {self.name!r} returned {got}; must return a float tensor of shape ({n},)")
        if score_N.device != device:
            raise ValueError(f"criterion: {self.name!r} returned scores on {score_N.device}; must be on {device}")
        return score_N.float()

    def score_chunk(
        self, tokens: TokensAtExit, rows: slice | Tensor, logits_CV: Tensor, entropy_C: Tensor | None = None
    ) -> Tensor:
        """``(C,)``: of the ``tokens`` at ``rows``, whose logits have been made just now, and perhaps their entropy.

        Their places are left out, as no criterion reads them that reads logits.
        """
        before_CD, after_CD = tokens.before_ND[rows], tokens.after_ND[rows]
        return self.score(TokensAtExit(before_CD, after_CD, logits_CV, entropy_C, backend=tokens.backend))

    def score_with_losses(
        self, tokens: TokensAtExit, normed_ND: Tensor, head_VD: Tensor, label_N: Tensor, *, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Scores and cross-entropies of tokens whose logits ``normed @ head.T`` are never all in memory.

        Args:
            tokens: without logits.
            label_N: ``(N,)`` int64 in ``[0, V)``.
            dtype: of the matrix product.

        Returns:
            Two ``(N,)`` float32. Raises ValueError as :meth:`score`.
        """
        if not self.needs_logits:
            return self.score(tokens), token_losses(normed_ND, head_VD, label_N, dtype=dtype)[0]
        score = partial(self.score_chunk, tokens)
        loss_N, score_N = token_losses(normed_ND, head_VD, label_N, dtype=dtype, score=score)
        return score_N, loss_N


def score_by_two(
    first: Criterion,
    second: Criterion,
    tokens: TokensAtExit,
    normed_ND: Tensor,
    head_VD: Tensor,
    label_N: Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by both criteria, and losses, of one look at the logits: see :meth:`Criterion.score_with_losses`.

    Returns:
        Three ``(N,)`` float32: by ``first``, by ``second``, cross-entropies. Raises ValueError as :meth:`score`.
    """
    if not second.needs_logits:
        score_N, loss_N = first.score_with_losses(tokens, normed_ND, head_VD, label_N, dtype=dtype)
        return score_N, second.score(tokens), loss_N
    if not first.needs_logits:
        score_N, loss_N = second.score_with_losses(tokens, normed_ND, head_VD, label_N, dtype=dtype)
        return first.score(tokens), score_N, loss_N
    second_N = torch.empty(len(normed_ND), dtype=torch.float32, device=normed_ND.device)

    def both(rows: slice, logits_CV: Tensor, entropy_C: Tensor) -> Tensor:
        second_N[rows] = second.score_chunk(tokens, rows, logits_CV, entropy_C)
        return first.score_chunk(tokens, rows, logits_CV, entropy_C)

    loss_N, first_N = token_losses(normed_ND, head_VD, label_N, dtype=dtype, score=both)
    return first_N, second_N, loss_N


ScoreFunction = Callable[..., Tensor]  # f(h_in_ND, h_out_ND, *, logits=None) -> (N,)


def register_criterion(
    name: str, *, label: str | None = None, needs_logits: bool = False
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator: the criterion ``name`` is this function ``f(h_in_ND, h_out_ND, *, logits=None) -> (N,)``, low = hard.

    Known from here on to :class:`HardTokenGather`, to training as a value of ``--criterion``, and to models, which
    must find it registered when they are loaded.

    Args:
        label: what a score is, in words; by default the name.
        needs_logits: whether the function reads logits. Training makes them a chunk of tokens at a time, and none for
            the base's training tokens where this is False; :class:`HardTokenGather` hands on what it is given.

    Raises:
        ValueError: an empty name, or one that is taken.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: {name!r}; must be a string that is not empty")
    if name in CRITERIA:
        raise ValueError(f"name: {name!r}; must not be taken (there are {', '.join(map(repr, CRITERIA))})")

    def register(function: ScoreFunction) -> ScoreFunction:
        code = _code_of(function)
        CRITERIA[name] = Criterion(name, label or name, partial(_call, function), needs_logits, code=code)
        settings.CRITERIA.append(name)
        return function

    return register


def _call(function: ScoreFunction, tokens: TokensAtExit) -> Tensor:
    return function(tokens.before_ND, tokens.after_ND, logits=tokens.logits)


def _code_of(function: ScoreFunction) -> str:
    """SHA-256 of the file of a plain function. Of anything else, whose scores may depend on what no file has: a value
    of this process."""
    try:
        if inspect.isfunction(function) and function.__closure__ is None:
            return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except OSError:  # typed in
        pass
    return uuid.uuid4().hex


def get_criterion(criterion: str | Criterion | ScoreFunction) -> Criterion:
    """The criterion of that name, or one of that function.

    Raises:
        ValueError: neither a registered name nor a callable.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        return Criterion(name, name, partial(_call, criterion))
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(f"criterion: {criterion!r}; must be a callable or one of {', '.join(map(repr, CRITERIA))}")
    return CRITERIA[criterion]


def model_criteria() -> tuple[str, ...]:
    """Names of those that a model can be run by."""
    return tuple(name for name, criterion in CRITERIA.items() if criterion.for_models)


def score_label(name: str) -> str:
    """What a token's score is, in words; of a criterion that is not registered here, its name."""
    return CRITERIA[name].label if name in CRITERIA else name


def score_tokens(
    criterion: str | Criterion | ScoreFunction,
    h_in_ND: Tensor,
    h_out_ND: Tensor,
    *,
    logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The scores of N tokens, low = hard, with the shape and dtype checked.

    Args:
        criterion: a registered name, a criterion, or a function as :func:`register_criterion` takes.
        h_in_ND, h_out_ND: ``(N, D)`` hidden states before and after the model.
        logits: ``(N, V)`` or ``(B, S, V)``, for the criteria that read them.
        backend: of ``"cosine"``, the criterion that is an operator of :mod:`cascade_fast.ops`.

    Returns:
        ``(N,)`` float32.

    Raises:
        ValueError: an unknown criterion, missing logits, or a criterion that does not return N float scores.
    """
    return get_criterion(criterion).score(TokensAtExit(h_in_ND, h_out_ND, logits, backend=backend))


def _cosine(tokens: TokensAtExit) -> Tensor:
    """``<in, out> / (|in| |out| + 1e-8)``: low where the model changed the token a lot. Differentiable."""
    return ops.cosine_score(tokens.before_ND, tokens.after_ND, backend=tokens.backend)


def _negative_entropy(tokens: TokensAtExit) -> Tensor:
    """``-H``, ``H = -sum p log p`` the entropy of the logits: low where the model is unsure. No gradient."""
    return -_entropy(tokens)


def _entropy(tokens: TokensAtExit) -> Tensor:
    if tokens.entropy_N is not None:
        return tokens.entropy_N
    assert tokens.logits is not None
    return token_entropy(tokens.logits)


def _margin(tokens: TokensAtExit) -> Tensor:
    """``p1 - p2``, the probabilities of the two likeliest tokens: low where the model is torn. No gradient.

    Margin sampling, of active learning: Scheffer, Decomain and Wrobel, Active Hidden Markov Models for Information
    Extraction, 2001. In plain torch on every device: the fused cross-entropy gives loss and entropy alone.
    """
    assert tokens.logits is not None
    return token_margin(tokens.logits)


def _distance_from_band(tokens: TokensAtExit) -> Tensor:
    """``|H - 2.5|``, ``H`` the entropy of the logits in nats: low in a band around :data:`BAND_NATS`. No gradient.

    Meant to choose what is trained on: where the entropy is highest, much of the loss is chance and cannot be learnt.
    EKSFT (arXiv 2605.29303) leaves such tokens out of a fine-tune; the middle is our own choice.
    """
    return (_entropy(tokens) - BAND_NATS).abs()


def _noise(tokens: TokensAtExit) -> Tensor:
    """Uniform in [0, 1): of the tokens' places, or, where those are unknown, of torch's generator of the device."""
    after_ND, places = tokens.after_ND, tokens.places
    if places is None:
        return torch.rand(after_ND.shape[0], device=after_ND.device)
    score_N = random_scores(
        places.sequence_N, places.position_N, seed=places.seed, split=places.split, stage=places.stage
    )
    return score_N.to(after_ND.device)


def _order(tokens: TokensAtExit) -> Tensor:
    """The number of the sequence: the first of the text come first. Where that is unknown, the order of the tokens."""
    after_ND, places = tokens.after_ND, tokens.places
    order_N = torch.arange(len(after_ND)) if places is None else places.sequence_N
    return order_N.to(after_ND.device, torch.float32)


# By name, which are settings.CRITERIA.
CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("cosine", "cosine between what goes in and what comes out", _cosine, operator="cosine_score"),
        Criterion("entropy", "minus the entropy of the logits, in nats", _negative_entropy, needs_logits=True),
        Criterion("margin", "the likeliest token's probability above the second's", _margin, needs_logits=True),
        Criterion("band", f"distance of the entropy from {BAND_NATS} nats", _distance_from_band, needs_logits=True),
        Criterion("random", "uniform noise", _noise, for_models=False, base_pass_of="entropy"),
        Criterion("first", "number of the sequence", _order, for_models=False, base_pass_of="entropy"),
    )
}


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of ``softmax(logits)`` in nats, of every token; a vocabulary entry at -inf adds nothing.

    Args:
        logits: ``(..., V)`` float, any strides. Turned into float32 a chunk of tokens at a time, so no second array
            of their size is made.

    Returns:
        ``(N,)`` float32, N the product of the leading dimensions.
    """
    # entr(p) = -p log p, and 0 at p = 0.
    return _of_probabilities(logits, lambda probs_CV: torch.special.entr(probs_CV).sum(-1))


@torch.no_grad()
def token_margin(logits: Tensor) -> Tensor:
    """The largest entry of ``softmax(logits)`` less the second largest, of every token.

    Args:
        logits: as of :func:`token_entropy`; V >= 2.

    Returns:
        ``(N,)`` float32 in [0, 1], N the product of the leading dimensions.
    """
    return _of_probabilities(logits, lambda probs_CV: -probs_CV.topk(2).values.diff(dim=-1).squeeze(-1))


def _of_probabilities(logits: Tensor, of_chunk: Callable[[Tensor], Tensor]) -> Tensor:
    """``(N,)``: of the softmax of every token in float32, ``(C, V)`` at a time."""
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[:-1].numel(), dtype=torch.float32)
    if logits.dim() > 2:  # one sequence at a time: each is a view, while flattening all of them may be a copy
        return torch.cat([_of_probabilities(part, of_chunk) for part in logits])
    chunks = logits.split(chunk_tokens(logits.shape[-1], torch.float32))
    return torch.cat([of_chunk(chunk_CV.float().softmax(-1)) for chunk_CV in chunks])


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
