"""Pick the hard tokens of any model, pack their rows, and put results back where they came from.

The drop-in form of CASCADE's selection: it needs two hidden states and nothing else of this package's trainer. The
fixed share of tokens, kept in order of position, is that of Mixture-of-Depths (arXiv 2404.02258).

Shape legend: B sequences, S sequence length, N = B * S tokens, D hidden size, K hard tokens, V vocabulary,
R selections of M tokens each (one of all N with scope "batch", B of S with scope "sequence").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from cascade_fast import ops
from cascade_fast.criteria import Criterion, ScoreFunction, get_criterion, score_tokens
from cascade_fast.ops.reference import LARGEST_KEY, sort_key
from cascade_fast.ops.schema import FLOAT_DTYPES
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.selection import select_below

SCOPES = ("batch", "sequence")


@dataclass(frozen=True, eq=False)
class HardTokens:
    """The hard tokens of one call, in order of position.

    Attributes:
        hidden_KD: ``(K, D)`` their rows of ``h_out``; differentiable.
        index_K: ``(K,)`` int64, strictly ascending: where they are among the flattened ``B * S`` tokens.
        scores: ``(B, S)`` or ``(N,)`` float32, of every token, as the criterion gave them.
        threshold: float32 tensor, ``()`` or with scope "sequence" ``(B,)``; hard iff ``score <= threshold``.
            -inf where nothing was selected, +inf where a NaN was.
        carried: the entries of every ``carry`` array, each ``(K,)``.
        shape: ``(B, S)`` or ``(N,)``, of the tokens that were given.
        backend: the operators' backend.
    """

    hidden_KD: Tensor
    index_K: Tensor
    scores: Tensor
    threshold: Tensor
    carried: tuple[Tensor, ...]
    shape: tuple[int, ...]
    backend: str

    def scatter(self, rows_KD: Tensor, *, into: Tensor, add: bool = False) -> Tensor:
        """A copy of ``into`` with ``rows_KD`` at the hard tokens; the other rows pass through.

        Args:
            rows_KD: ``(K, E)``, dtype and device of ``into``; E may differ from D.
            into: ``(B, S, E)`` or ``(N, E)``, the tokens that were gathered from; not modified.
            add: add to the rows instead of replacing them, in float32, rounded once.

        Returns:
            The shape of ``into``, contiguous. Differentiable in both; a replaced row of ``into`` gets no gradient.

        Raises:
            ValueError: shapes, dtypes or devices that do not match.
        """
        _check_tokens("into", into, self.shape)
        out_NE = ops.scatter_rows(rows_KD, self.index_K, into.flatten(0, -2), add=add, backend=self.backend)
        return out_NE.view(into.shape)


class HardTokenGather(nn.Module):
    """Gathers the hard tokens of a batch. No parameters, no state.

    >>> gather = HardTokenGather(hard_ratio=0.6)
    >>> hard = gather(h_in, h_out, mask, carry=(labels, positions))
    >>> full = hard.scatter(stage(hard.hidden_KD), into=h_out)

    With ``hard_ratio`` exactly ``floor(r (n - 1)) + 1`` of n real tokens are hard, those with the lowest scores; among
    equal scores the first position wins. With ``threshold``, the form for inference, a token is hard iff
    ``score <= threshold``, whatever the other tokens are. Padding is never hard. NaN scores are never hard by
    threshold, and by ratio only when all other real tokens are taken, those that score +inf included; nothing is
    checked, as that would wait for a GPU.

    Tokens that are only read, such as a chat's prompt, are best treated as padding: with ``labels != -100`` as the mask
    they are never hard and have no part in the share or the quantile. A token's label is the token after it.

    What waits for the device: ``threshold`` (its count is dynamic), and ``hard_ratio`` with a mask on a GPU, unless
    the call gives ``n_real``. Everything else does not, and runs under ``torch.compile(fullgraph=True)``.

    Args:
        hard_ratio: the share of hard tokens, in (0, 1]. Give this or ``threshold``.
        threshold: a number that is not NaN, or the ``threshold`` of an earlier call with scope "batch".
        scope: ``"batch"`` selects among all tokens of a call, ``"sequence"`` the same share in each sequence (the
            second last dimension of the hidden states). A threshold means the same in both.
        criterion: ``"cosine"``, ``"entropy"`` (needs ``logits``), ``"random"`` (noise that ``torch.manual_seed``
            repeats), a name given to :func:`cascade_fast.criteria.register_criterion`, or a callable
            ``f(h_in_ND, h_out_ND, *, logits) -> (N,)`` float scores, low = hard. If that is a module, its parameters
            become this module's.
        backend: ``"auto"`` or one of :data:`cascade_fast.ops.BACKENDS`.

    Raises:
        ValueError: an argument outside of what is allowed; names it.
    """

    def __init__(
        self,
        hard_ratio: float | None = None,
        *,
        threshold: float | Tensor | None = None,
        scope: str = "batch",
        criterion: str | Criterion | ScoreFunction = "cosine",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if (hard_ratio is None) == (threshold is None):
            raise ValueError(f"hard_ratio: {hard_ratio}, threshold: {threshold}; exactly one of them must be given")
        self.hard_ratio, self.threshold = _number("hard_ratio", hard_ratio), _number("threshold", threshold)
        if self.hard_ratio is not None and not 0 < self.hard_ratio <= 1:
            raise ValueError(f"hard_ratio: {hard_ratio}; must be in (0, 1]")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError(f"threshold: {threshold}; must not be NaN")
        if scope not in SCOPES:
            raise ValueError(f"scope: {scope!r}; must be one of {', '.join(map(repr, SCOPES))}")
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend: {backend!r}; must be one of {', '.join(map(repr, ops.BACKENDS))}")
        get_criterion(criterion)
        self.scope, self.criterion, self.backend = scope, criterion, backend
        if self.hard_ratio is not None:
            # The decimal number as written, as selection.hard_count takes it; as two ints, which torch.compile traces.
            self._numerator, self._denominator = Fraction(repr(self.hard_ratio)).as_integer_ratio()

    def extra_repr(self) -> str:
        rule = f"threshold={self.threshold}" if self.hard_ratio is None else f"hard_ratio={self.hard_ratio}"
        return f"{rule}, scope={self.scope!r}, criterion={self.criterion!r}, backend={self.backend!r}"

    def forward(
        self,
        h_in: Tensor,
        h_out: Tensor,
        mask: Tensor | None = None,
        *,
        carry: Sequence[Tensor] = (),
        logits: Tensor | None = None,
        n_real: int | Sequence[int] | None = None,
    ) -> HardTokens:
        """
        Args:
            h_in, h_out: ``(B, S, D)`` or ``(N, D)`` hidden states before and after the model, one dtype of float32,
                float16, bfloat16; any strides. More leading dimensions are allowed.
            mask: ``(B, S)`` or ``(N,)`` bool or integers, True or nonzero = a real token (or one with a label, see
                above); None = all are. It may stay on the CPU.
            carry: arrays ``(B, S)`` or ``(N,)`` of any dtype that travel with the tokens (labels, positions).
            logits: ``(B, S, V)`` or ``(N, V)``, for a criterion that reads them.
            n_real: how many tokens are real, if the host knows: one int, or with scope "sequence" one for each
                sequence. Saves the wait for a mask on a GPU; where the mask is on the CPU, it is checked.

        Raises:
            ValueError: shapes, dtypes or devices that do not match; names the argument.
            RuntimeError: a ``backend`` asked for by name that cannot run here.
        """
        if h_out.dim() < 2 or h_out.dtype not in FLOAT_DTYPES:
            raise ValueError(f"h_out: {_describe(h_out)}; must be float32, float16 or bfloat16, (B, S, D) or (N, D)")
        if h_in.shape != h_out.shape:
            raise ValueError(f"h_in: {_describe(h_in)}; must have the shape of h_out, {tuple(h_out.shape)}")
        shape = h_out.shape[:-1]
        carried = _flatten_carry(carry, shape, h_out.device)
        if logits is not None:
            _check_tokens("logits", logits, shape)

        h_out_ND = h_out.flatten(0, -2)
        score_N = score_tokens(self.criterion, h_in.flatten(0, -2), h_out_ND, logits=logits, backend=self.backend)
        index_K, threshold = self._select(score_N.detach().view(shape), mask, n_real)
        hidden_KD, gathered = ops.gather_rows(h_out_ND, index_K, carried, backend=self.backend)
        return HardTokens(hidden_KD, index_K, score_N.view(shape), threshold, gathered, tuple(shape), self.backend)

    def _select(self, scores: Tensor, mask: Tensor | None, n_real: int | Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """``index_K`` among the flattened tokens, and the threshold."""
        if mask is not None and (mask.shape != scores.shape or mask.is_floating_point()):
            raise ValueError(f"mask: {_describe(mask)}; must be bool or integers of shape {tuple(scores.shape)}")
        if n_real is not None and (mask is None or self.hard_ratio is None):
            raise ValueError(f"n_real: {n_real}; must only be given with a mask, to a module with hard_ratio")
        if self.threshold is not None:
            # NaN, which stands for padding too, is below no threshold, not even below +inf.
            real = scores if mask is None else scores.masked_fill(_on(mask == 0, scores.device), torch.nan)
            return select_below(real.flatten(), self.threshold), scores.new_full((), self.threshold)

        rows_of = () if self.scope == "batch" else scores.shape[:-1]
        scores_RM = scores.reshape(math.prod(rows_of), scores.shape[len(rows_of) :].numel())
        n: int | list[int] = scores_RM.shape[1]
        padding_RM = None
        if mask is not None:
            padding_RM = mask.reshape(scores_RM.shape) == 0
            n = _real_counts(padding_RM, n_real)
            padding_RM = _on(padding_RM, scores.device)
        index_K, threshold_R = self._hardest(scores_RM, padding_RM, n)
        return index_K, threshold_R.view(rows_of)

    def _hardest(self, scores_RM: Tensor, padding_RM: Tensor | None, n: int | list[int]) -> tuple[Tensor, Tensor]:
        """The exact share of every row's ``n`` real tokens; the thresholds."""
        r, m = scores_RM.shape
        if isinstance(n, int):
            index_RK, bounds_R2 = self._hardest_of_equal_counts(scores_RM, padding_RM, n)
            first_R1 = torch.arange(r, device=scores_RM.device).unsqueeze(1) * m  # of each row, among all tokens
            return (index_RK + first_R1).flatten(), _quantile(bounds_R2, self._weight(n))
        # Rows of different counts, which the operator does not take: mark them by a sort, let it pack the marks.
        assert padding_RM is not None
        counts = [self._count(length) for length in n]
        k_R1 = _on(torch.tensor(counts), scores_RM.device).unsqueeze(1)
        key_RM = sort_key(scores_RM).masked_fill(padding_RM, LARGEST_KEY)  # after NaN
        order_RM = key_RM.sort(dim=-1, stable=True).indices
        taken_RM = (torch.arange(m, device=scores_RM.device) >= k_R1).float()
        marks_RM = torch.empty_like(scores_RM).scatter(1, order_RM, taken_RM)  # 0 where hard, 1 elsewhere
        index_K, _ = ops.select_hard(marks_RM.flatten(), sum(counts), backend=self.backend)
        ordered_RM = scores_RM.masked_fill(padding_RM, torch.inf).gather(1, order_RM)
        inf_R1 = scores_RM.new_full((r, 1), torch.inf)
        bounds_R2 = torch.cat([-inf_R1, ordered_RM, inf_R1], dim=1).gather(1, torch.cat([k_R1, k_R1 + 1], dim=1))
        weight_R = torch.tensor([self._weight(length) for length in n], dtype=torch.float64)
        return index_K, _quantile(bounds_R2, _on(weight_R, scores_RM.device))

    def _hardest_of_equal_counts(self, scores_RM: Tensor, padding_RM: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """``index_RK`` in the row and ``bounds_R2`` where every row has ``n`` real tokens."""
        k = self._count(n)
        if padding_RM is None:
            return ops.select_hard(scores_RM, k, backend=self.backend)
        # No score is left that would put padding after NaN: pick the real tokens first, then the hard ones of those.
        real_RN, _ = ops.select_hard(padding_RM.float(), n, backend=self.backend)
        index_RK, bounds_R2 = ops.select_hard(scores_RM.gather(1, real_RN), k, backend=self.backend)
        return real_RN.gather(1, index_RK), bounds_R2

    def _count(self, n: int) -> int:
        """``selection.hard_count``: ``floor(r (n - 1)) + 1``."""
        return self._numerator * (n - 1) // self._denominator + 1 if n > 0 else 0

    def _weight(self, n: int) -> float:
        """How far the r-quantile of n scores lies between the k-th and the (k+1)-th."""
        return self._numerator * (n - 1) % self._denominator / self._denominator


def _quantile(bounds_R2: Tensor, weight: float | Tensor) -> Tensor:
    """``selection.quantile_threshold`` on the device: linear between the bounds, always below the second one."""
    kth_R, following_R = bounds_R2.unbind(-1)
    kth_R = torch.where(kth_R.isnan(), torch.inf, kth_R)  # every score that is a number has been taken
    threshold_R = (kth_R.double() + weight * (following_R.double() - kth_R.double())).float()
    # False too where a bound is infinite or the second one NaN: then the k-th score itself.
    return torch.where(threshold_R < following_R, threshold_R, kth_R)


def _real_counts(padding_RM: Tensor, n_real: int | Sequence[int] | None) -> int | list[int]:
    """Real tokens of every row; one int when all rows have as many."""
    rows, m = padding_RM.shape
    given = None if n_real is None else [n_real] if isinstance(n_real, int) else list(n_real)
    if given is not None and (len(given) != rows or not all(0 <= count <= m for count in given)):
        raise ValueError(f"n_real: {n_real}; must be {rows} count(s) between 0 and {m}")
    if given is None or (padding_RM.device.type == "cpu" and not torch.compiler.is_compiling()):
        counted: list[int] = (~padding_RM).sum(-1).tolist()  # on a GPU: the one wait
        if given is not None and given != counted:
            raise ValueError(f"n_real: {n_real}; must be the mask's number of real tokens, {counted}")
        given = counted
    if not given:
        return m
    return given[0] if all(count == given[0] for count in given) else given


def _number(name: str, value: float | Tensor | None) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        raise ValueError(f"{name}: {value!r}; must be a number") from None


def _on(t: Tensor, device: torch.device) -> Tensor:
    """``t`` as it is, or on its way to ``device`` without a wait for it."""
    return t.to(device, non_blocking=True)


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {dtype_name(t.dtype)} on {t.device}"


def _check_tokens(name: str, t: Tensor, shape: Sequence[int]) -> None:
    if t.dim() != len(shape) + 1 or t.shape[:-1] != tuple(shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: {_describe(t)}; must have shape ({wanted}, any), the tokens of h_out")


def _flatten_carry(carry: Sequence[Tensor], shape: Sequence[int], device: torch.device) -> list[Tensor]:
    if isinstance(carry, Tensor):
        raise ValueError(f"carry: a tensor {_describe(carry)}; must be a tuple or list of tensors")
    for i, array in enumerate(carry):
        if array.shape != tuple(shape) or array.device != device:
            raise ValueError(f"carry[{i}]: {_describe(array)}; must have shape {tuple(shape)} and be on {device}")
    return [array.flatten() for array in carry]
