"""Operators of the cascade: score tokens, select the hard ones, gather their rows, scatter results back; parts of a
decoder layer (``layers.py``, ``attention.py``, ``heads.py``, ``low_rank.py``); and steps of AdamW (``optimizer.py``).

Every operator has one contract (``schema.py``), a plain torch body (``reference.py``) and faster bodies picked by
``backends.py``. ``backend`` is ``"auto"`` or a name of :data:`BACKENDS`; a name that cannot run is an error.

A trailing underscore: the operator writes into its first argument, as torch's own.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows, C tokens of a chunk,
V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_fast.ops import schema  # declares the operators
from cascade_fast.ops.attention import attention, attention_backward
from cascade_fast.ops.backends import BACKENDS, GPU_OPS, OPS, SELECTION_OPS, choose, fused, why_not
from cascade_fast.ops.heads import place_heads, take_heads
from cascade_fast.ops.layers import (
    add_rms_norm,
    rotate_rows,
    rotate_rows_backward,
    scale_into_,
    silu_mul,
)
from cascade_fast.ops.low_rank import low_rank, low_rank_backward
from cascade_fast.ops.optimizer import adamw_, grad_norm

__all__ = [
    "BACKENDS",
    "GPU_OPS",
    "OPS",
    "SELECTION_OPS",
    "adamw8bit",
    "adamw_",
    "add_rms_norm",
    "attention",
    "attention_backward",
    "choose",
    "cosine_score",
    "cross_entropy_",
    "fused",
    "gather_rows",
    "grad_norm",
    "low_rank",
    "low_rank_backward",
    "place_heads",
    "rms_norm",
    "rotate_rows",
    "rotate_rows_backward",
    "scale_into_",
    "scatter_rows",
    "select_hard",
    "silu_mul",
    "take_heads",
    "why_not",
]


def cosine_score(h_in_ND: Tensor, h_out_ND: Tensor, *, backend: str = "auto") -> Tensor:
    """Cosine similarity of each row pair, ``<a, b> / (|a| |b| + 1e-8)``, accumulated in float32.

    Low means the model changed the token a lot: hard. A zero row scores 0.

    Args:
        h_in_ND, h_out_ND: ``(N, D)``, one dtype of float32, float16, bfloat16; any strides.

    Returns:
        ``(N,)`` float32. Differentiable in both inputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
        RuntimeError: ``backend`` asked for by name cannot run here.
    """
    return torch.ops.cascade_fast.cosine_score(h_in_ND, h_out_ND, backend=backend)


def select_hard(scores: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The indices of the ``k`` smallest scores, in ascending order of index; exact and deterministic.

    Among equal scores the lowest index is taken first (-0.0 equals 0.0). NaN, of either sign, counts as larger than
    +inf. Subnormals keep their order even where PyTorch is told to flush them.

    Args:
        scores: ``(N,)`` or ``(B, N)`` float32, N < 2^31; with B rows each row is selected for itself.
        k: how many, ``0 <= k <= N``; known on the host, so nothing waits for the device.

    Returns:
        ``index``: ``(k,)`` or ``(B, k)`` int64, strictly ascending.
        ``bounds``: ``(2,)`` or ``(B, 2)`` float32, the k-th and the (k+1)-th smallest score: every threshold
        ``t`` with ``bounds[0] <= t < bounds[1]`` selects the same tokens when no tie crosses the boundary.
        -inf where there is no k-th (k = 0), +inf where there is no (k+1)-th (k = N).

    Raises:
        ValueError: a bad shape or dtype, or ``k`` out of range.
    """
    if scores.dim() == 1:
        index_1K, bounds_12 = torch.ops.cascade_fast.select_hard(scores.unsqueeze(0), k, backend=backend)
        return index_1K.squeeze(0), bounds_12.squeeze(0)
    return torch.ops.cascade_fast.select_hard(scores, k, backend=backend)


def gather_rows(
    hidden_ND: Tensor, index_K: Tensor, carried: Sequence[Tensor] = (), *, backend: str = "auto"
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows ``index_K`` of ``hidden_ND``, and the same entries of the small arrays that travel with them.

    Args:
        hidden_ND: ``(N, D)`` float32, float16 or bfloat16; any strides.
        index_K: ``(K,)`` int64 in ``[0, N)``, no index twice (the backward pass writes each row once).
        carried: ``(N,)`` arrays of any dtype (labels, positions, ...); no gradient flows through them.

    Returns:
        ``hidden_KD`` (differentiable; its backward is :func:`scatter_rows`) and the gathered arrays.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        IndexError: on the CPU, an index outside ``[0, N)``. Undefined on a GPU, as checking would wait for it.
    """
    hidden_KD, gathered = torch.ops.cascade_fast.gather_rows(hidden_ND, index_K, list(carried), backend=backend)
    return hidden_KD, tuple(gathered)


def scatter_rows(
    rows_KD: Tensor, index_K: Tensor, into_ND: Tensor, *, add: bool = False, backend: str = "auto"
) -> Tensor:
    """A copy of ``into_ND`` with ``rows_KD`` put back at ``index_K`` (or, with ``add``, added there).

    Args:
        rows_KD: ``(K, D)``, dtype and device of ``into_ND``; any strides.
        index_K: ``(K,)`` int64 in ``[0, N)``, no index twice.
        into_ND: ``(N, D)``; not modified.
        add: add in float32 and round once, instead of replacing.

    Returns:
        ``(N, D)``, contiguous. Differentiable in ``rows_KD`` and in ``into_ND`` (a replaced row gets no gradient).

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        IndexError: on the CPU, an index outside ``[0, N)``. Undefined on a GPU.
    """
    return torch.ops.cascade_fast.scatter_rows(rows_KD, index_K, into_ND, add=add, backend=backend)


def cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, *, grad: bool = False, scale: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and entropy of every row of logits and, with ``grad``, the logits' gradient in their own place.

    All arithmetic in float32, in one pass over memory: what ``logits.float()``, ``log_softmax``, ``nll_loss`` and their
    backward would do in ten. A logit of -inf is a probability of 0; a row with NaN or +inf gives NaN.

    Args:
        logits_CV: ``(C, V)`` float32, float16 or bfloat16, contiguous, V >= 1. With ``grad`` it is overwritten by
            ``scale * (softmax(logits) - one_hot(labels))``, the gradient of the *summed* loss for a scale of 1, rounded
            once to its dtype.
        labels_C: ``(C,)`` int64 in ``[0, V)``.
        scale: of the gradient only, a positive number. In float16, probabilities below ``3e-8 / scale`` become 0.

    Returns:
        ``loss`` and ``entropy``, each ``(C,)`` float32, in nats. Not differentiable by autograd: see
        :func:`cascade_fast.losses.linear_cross_entropy`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
        IndexError: on the CPU, a label outside ``[0, V)``. Undefined on a GPU.
    """
    return torch.ops.cascade_fast.cross_entropy_(logits_CV, labels_C, grad=grad, scale=scale, backend=backend)


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, *, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` of every row, in float32, rounded once to ``dtype``.

    Args:
        x_ND: ``(N, D)`` float32; any strides.
        weight_D: ``(D,)`` float32.
        eps: added to the mean square.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        ``(N, D)`` of ``dtype``. Differentiable in ``x_ND`` and ``weight_D``, whose gradients are float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    if torch.compiler.is_compiling():
        return torch.ops.cascade_fast.rms_norm(x_ND, weight_D, eps, dtype=dtype, backend=backend)[0]
    return schema.RMSNorm.apply(x_ND, weight_D, eps, dtype, backend)


def adamw8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skipped: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW (arXiv 1711.05101) in place, with moments in blockwise 8-bit codes (arXiv 2110.02861).

    The state is that of bitsandbytes' CPU optimizer: each moment is a code of the dynamic map times its block's scale,
    the largest magnitude of 256 consecutive values. ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``,
    ``p = (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)`` in float32, with
    the moments before they are rounded. One result whatever the number of threads.

    A NaN gradient makes its parameter NaN and leaves its codes at 0; an infinite one makes its block's scales infinite,
    and with the next step all 256 parameters NaN: do not step with either.

    Args:
        params: contiguous float32, any shape; changed.
        grads: like ``params``, or float16 or bfloat16; any strides.
        state1, state2: first and second moments, both uint8 or both float32 (tensors too small to be worth rounding);
            contiguous, in the parameters' shapes; changed.
        absmax1, absmax2: float32 scales, one for each 256 values or what is left; empty for float32 moments; changed.
        steps: the number of this step, from 1.
        grad_scale, found_inf, skipped: ``()`` float32 on the parameters' device; no GPU body waits for them. Gradients
            are divided by ``grad_scale`` (up to 1e15); nothing is changed unless ``found_inf`` is 0; ``skipped`` is
            taken off all ``steps``: steps left out before, whose number the host does not know.

    Raises:
        ValueError: a shape, dtype, device or memory layout that does not fit; names the argument.
        RuntimeError: ``backend`` asked for by name cannot run here.
    """
    torch.ops.cascade_fast.adamw8bit(
        list(params), list(grads), list(state1), list(state2), list(absmax1), list(absmax2), list(steps),
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        grad_scale=grad_scale, found_inf=found_inf, skipped=skipped, backend=backend,
    )  # fmt: skip
