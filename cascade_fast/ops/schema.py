"""The contract of every operator, stated once: schema, argument rules, fake (shapes) and autograd.

Bodies live elsewhere (``reference.py``, ``csrc/``, ``kernels/``) and all obey what is written here; ``backends.py``
picks one per call. ``backend`` is part of each schema, so that a choice made by name survives ``torch.compile``
and reaches the backward pass.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_fast.ops import backends, reference

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROWS = 2**31 - 1

_LIB = torch.library.Library("cascade_fast", "DEF")
_LIB.define("cosine_score(Tensor h_in, Tensor h_out, *, str backend='auto') -> Tensor")
_LIB.define("select_hard(Tensor scores, SymInt k, *, str backend='auto') -> (Tensor, Tensor)")
_LIB.define("gather_rows(Tensor hidden, Tensor index, Tensor[] carried, *, str backend='auto') -> (Tensor, Tensor[])")
_LIB.define("scatter_rows(Tensor rows, Tensor index, Tensor into, *, bool add=False, str backend='auto') -> Tensor")
_LIB.define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, *, bool grad=False, float scale=1.0, str backend='auto') -> "
    "(Tensor, Tensor)"
)
_LIB.define("rms_norm(Tensor x, Tensor weight, float eps, *, ScalarType dtype, str backend='auto') -> (Tensor, Tensor)")
_LIB.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inv_rms, bool weight_grad=True, *, "
    "str backend='auto') -> (Tensor, Tensor)"
)
_LIB.define(
    "adamw8bit(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1, "
    "Tensor(e!)[] absmax2, int[] steps, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? skipped=None, str backend='auto') -> ()"
)


def check(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(message())


def call(bodies: Mapping[str, Callable[..., Any]], name: str, *args: Any, backend: str) -> Any:
    """The operator ``name`` where torch traces; else its body at once, for one that is not differentiable: torch's way
    there takes longer than some bodies do."""
    op = getattr(torch.ops.cascade_fast, name) if torch.compiler.is_compiling() else bodies[name]
    return op(*args, backend=backend)


def shape_of(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


# --- argument rules: the only statement of what each op accepts, run by the fakes and before every body -------------


def _check_cosine_score(h_in: Tensor, h_out: Tensor) -> None:
    check(h_in.dim() == 2, lambda: f"h_in: {shape_of(h_in)}; must have 2 dimensions (N, D)")
    check(
        h_in.shape == h_out.shape, lambda: f"h_out: {shape_of(h_out)}; must have the shape of h_in, {tuple(h_in.shape)}"
    )
    check(h_in.dtype in FLOAT_DTYPES, lambda: f"h_in: {shape_of(h_in)}; must be float32, float16 or bfloat16")
    check(h_out.dtype == h_in.dtype, lambda: f"h_out: {shape_of(h_out)}; must have the dtype of h_in, {h_in.dtype}")
    check(
        h_out.device == h_in.device, lambda: f"h_out: {shape_of(h_out)}; must be on the device of h_in, {h_in.device}"
    )
    check(h_in.shape[0] <= MAX_ROWS, lambda: f"h_in: {shape_of(h_in)}; must have at most 2^31 - 1 rows")


def _check_select_hard(scores: Tensor, k: int) -> None:
    check(scores.dim() == 2, lambda: f"scores: {shape_of(scores)}; must have 2 dimensions (B, N)")
    check(scores.dtype == torch.float32, lambda: f"scores: {shape_of(scores)}; must be float32")
    check(
        scores.shape[1] <= MAX_ROWS, lambda: f"scores: {shape_of(scores)}; must have at most 2^31 - 1 scores in a row"
    )
    check(0 <= k <= scores.shape[1], lambda: f"k: {k}; must be between 0 and the number of scores, {scores.shape[1]}")


def _check_index(index: Tensor, rows: Tensor, name: str) -> None:
    check(index.dim() == 1, lambda: f"index: {shape_of(index)}; must have 1 dimension (K,)")
    check(index.dtype == torch.int64, lambda: f"index: {shape_of(index)}; must be int64")
    check(
        index.device == rows.device, lambda: f"index: {shape_of(index)}; must be on the device of {name}, {rows.device}"
    )


def _check_gather_rows(hidden: Tensor, index: Tensor, carried: list[Tensor]) -> None:
    check(hidden.dim() == 2, lambda: f"hidden: {shape_of(hidden)}; must have 2 dimensions (N, D)")
    check(hidden.dtype in FLOAT_DTYPES, lambda: f"hidden: {shape_of(hidden)}; must be float32, float16 or bfloat16")
    _check_index(index, hidden, "hidden")
    for i, array in enumerate(carried):
        check(
            array.shape == hidden.shape[:1],
            lambda: f"carried[{i}]: {shape_of(array)}; must have shape ({hidden.shape[0]},)",
        )
        check(array.device == hidden.device, lambda: f"carried[{i}]: {shape_of(array)}; must be on {hidden.device}")


def _check_scatter_rows(rows: Tensor, index: Tensor, into: Tensor) -> None:
    check(into.dim() == 2, lambda: f"into: {shape_of(into)}; must have 2 dimensions (N, D)")
    check(into.dtype in FLOAT_DTYPES, lambda: f"into: {shape_of(into)}; must be float32, float16 or bfloat16")
    _check_index(index, into, "into")
    wanted = (index.shape[0], into.shape[1])
    check(
        tuple(rows.shape) == wanted,
        lambda: f"rows: {shape_of(rows)}; must have shape {wanted}, (K, D) of index and into",
    )
    check(rows.dtype == into.dtype, lambda: f"rows: {shape_of(rows)}; must have the dtype of into, {into.dtype}")
    check(rows.device == into.device, lambda: f"rows: {shape_of(rows)}; must be on the device of into, {into.device}")


def _check_cross_entropy(logits: Tensor, labels: Tensor, scale: float) -> None:
    check(logits.dim() == 2, lambda: f"logits: {shape_of(logits)}; must have 2 dimensions (C, V)")
    check(logits.dtype in FLOAT_DTYPES, lambda: f"logits: {shape_of(logits)}; must be float32, float16 or bfloat16")
    check(logits.is_contiguous(), lambda: f"logits: strides {tuple(logits.stride())}; must be contiguous")
    check(labels.shape == logits.shape[:1], lambda: f"labels: {shape_of(labels)}; must have shape ({logits.shape[0]},)")
    check(labels.dtype == torch.int64, lambda: f"labels: {shape_of(labels)}; must be int64")
    check(labels.device == logits.device, lambda: f"labels: {shape_of(labels)}; must be on the device of logits")
    check(0.0 < scale < math.inf, lambda: f"scale: {scale}; must be a positive number")


def _check_rms_norm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    check(x.dim() == 2, lambda: f"x: {shape_of(x)}; must have 2 dimensions (N, D)")
    check(x.dtype == torch.float32, lambda: f"x: {shape_of(x)}; must be float32")
    check(weight.shape == x.shape[1:], lambda: f"weight: {shape_of(weight)}; must have shape ({x.shape[1]},)")
    check(weight.dtype == torch.float32, lambda: f"weight: {shape_of(weight)}; must be float32")
    check(weight.device == x.device, lambda: f"weight: {shape_of(weight)}; must be on the device of x, {x.device}")
    check(dtype in FLOAT_DTYPES, lambda: f"dtype: {dtype}; must be float32, float16 or bfloat16")


def _check_adamw8bit(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    steps: list[int],
    **scalars: Tensor | None,
) -> None:
    lists: dict[str, Sequence] = {
        "grads": grads,
        "state1": state1,
        "state2": state2,
        "absmax1": absmax1,
        "absmax2": absmax2,
        "steps": steps,
    }
    for name, values in lists.items():
        check(
            len(values) == len(params),
            lambda: f"{name}: {len(values)} of them; must be one for each of {len(params)} params",
        )
    for i, param in enumerate(params):
        first, second, scale1, scale2 = state1[i], state2[i], absmax1[i], absmax2[i]
        blocks = -(-param.numel() // reference.BLOCK) if first.dtype == torch.uint8 else 0
        check(param.dtype == torch.float32, lambda: f"params[{i}]: {shape_of(param)}; must be float32")
        check(
            param.device == params[0].device,
            lambda: f"params[{i}]: {shape_of(param)}; must be on the device of the first, {params[0].device}",
        )
        check(
            param.is_contiguous(),
            lambda: f"params[{i}]: {shape_of(param)}, strides {param.stride()}; must be contiguous",
        )
        check(
            grads[i].shape == param.shape,
            lambda: f"grads[{i}]: {shape_of(grads[i])}; must have shape {tuple(param.shape)}",
        )
        check(
            grads[i].dtype in FLOAT_DTYPES,
            lambda: f"grads[{i}]: {shape_of(grads[i])}; must be float32, float16 or bfloat16",
        )
        check(grads[i].device == param.device, lambda: f"grads[{i}]: {shape_of(grads[i])}; must be on {param.device}")
        for name, state in (("state1", first), ("state2", second)):
            good = state.shape == param.shape and state.dtype in (torch.uint8, torch.float32)
            good = good and state.dtype == first.dtype and state.device == param.device and state.is_contiguous()
            check(
                good,
                lambda: (
                    f"{name}[{i}]: {shape_of(state)}; must be uint8 or float32 like state1, contiguous, in the shape "
                    f"and on the device of params[{i}], {shape_of(param)}"
                ),
            )
        for name, scale in (("absmax1", scale1), ("absmax2", scale2)):
            good = scale.shape == (blocks,) and scale.dtype == torch.float32 and scale.device == param.device
            check(
                good and scale.is_contiguous(),
                lambda: (
                    f"{name}[{i}]: {shape_of(scale)}; must be contiguous float32 of shape "
                    f"({blocks},), one for each block of 256 of a uint8 state"
                ),
            )
        check(steps[i] >= 1, lambda: f"steps[{i}]: {steps[i]}; must be 1 for the first step, or more")
    for name, value in scalars.items():
        if value is not None and params:
            good = value.shape == () and value.dtype == torch.float32 and value.device == params[0].device
            check(good, lambda: f"{name}: {shape_of(value)}; must be one float32 number () on {params[0].device}")


# --- fakes: shapes and dtypes of the results -------------------------------------------------------------------------


@torch.library.register_fake("cascade_fast::cosine_score", lib=_LIB)
def _(h_in, h_out, *, backend="auto"):
    _check_cosine_score(h_in, h_out)
    return h_in.new_empty(h_in.shape[0], dtype=torch.float32)


@torch.library.register_fake("cascade_fast::select_hard", lib=_LIB)
def _(scores, k, *, backend="auto"):
    _check_select_hard(scores, k)
    batch = scores.shape[0]
    return scores.new_empty(batch, k, dtype=torch.int64), scores.new_empty(batch, 2)


@torch.library.register_fake("cascade_fast::gather_rows", lib=_LIB)
def _(hidden, index, carried, *, backend="auto"):
    _check_gather_rows(hidden, index, carried)
    k = index.shape[0]
    return hidden.new_empty(k, hidden.shape[1]), [array.new_empty(k) for array in carried]


@torch.library.register_fake("cascade_fast::scatter_rows", lib=_LIB)
def _(rows, index, into, *, add=False, backend="auto"):
    _check_scatter_rows(rows, index, into)
    return into.new_empty(into.shape)


@torch.library.register_fake("cascade_fast::cross_entropy_", lib=_LIB)
def _(logits, labels, *, grad=False, scale=1.0, backend="auto"):
    _check_cross_entropy(logits, labels, scale)
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("cascade_fast::rms_norm", lib=_LIB)
def _(x, weight, eps, *, dtype, backend="auto"):
    _check_rms_norm(x, weight, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0])


@torch.library.register_fake("cascade_fast::rms_norm_backward", lib=_LIB)
def _(grad, x, weight, inv_rms, weight_grad=True, *, backend="auto"):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


@torch.library.register_fake("cascade_fast::adamw8bit", lib=_LIB)
def _(params, grads, state1, state2, absmax1, absmax2, steps, *, lr, beta1, beta2, eps, weight_decay, grad_scale=None,
      found_inf=None, skipped=None, backend="auto"):  # fmt: skip
    scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "skipped": skipped}
    _check_adamw8bit(params, grads, state1, state2, absmax1, absmax2, steps, **scalars)


# --- bodies: checked, then handed to whoever serves this device ------------------------------------------------------


def _cosine_score(h_in: Tensor, h_out: Tensor, *, backend: str = "auto") -> Tensor:
    _check_cosine_score(h_in, h_out)
    return backends.body("cosine_score", h_in.device, backend)(h_in, h_out)


def _select_hard(scores: Tensor, k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    _check_select_hard(scores, k)
    return backends.body("select_hard", scores.device, backend)(scores, k)


def _gather_rows(
    hidden: Tensor, index: Tensor, carried: list[Tensor], *, backend: str = "auto"
) -> tuple[Tensor, list[Tensor]]:
    _check_gather_rows(hidden, index, carried)
    return backends.body("gather_rows", hidden.device, backend)(hidden, index, carried)


def _scatter_rows(rows: Tensor, index: Tensor, into: Tensor, *, add: bool = False, backend: str = "auto") -> Tensor:
    _check_scatter_rows(rows, index, into)
    return backends.body("scatter_rows", into.device, backend)(rows, index, into, add)


def _cross_entropy_(
    logits: Tensor, labels: Tensor, *, grad: bool = False, scale: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(logits, labels, scale)
    return backends.body("cross_entropy_", logits.device, backend)(logits, labels, grad, scale)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check_rms_norm(x, weight, dtype)
    return backends.body("rms_norm", x.device, backend)(x, weight, eps, dtype)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inv_rms: Tensor, weight_grad: bool = True, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return backends.body("rms_norm_backward", x.device, backend)(grad, x, weight, inv_rms, weight_grad)


def _adamw8bit(
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    steps: list[int],
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
    scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "skipped": skipped}
    _check_adamw8bit(params, grads, state1, state2, absmax1, absmax2, steps, **scalars)
    if params:
        step = backends.body("adamw8bit", params[0].device, backend)
        settings = (lr, beta1, beta2, eps, weight_decay)
        step(params, grads, state1, state2, absmax1, absmax2, steps, *settings, *scalars.values())


_LIB.impl("cosine_score", _cosine_score, "CompositeExplicitAutograd")
_LIB.impl("select_hard", _select_hard, "CompositeExplicitAutograd")
_LIB.impl("gather_rows", _gather_rows, "CompositeExplicitAutograd")
_LIB.impl("scatter_rows", _scatter_rows, "CompositeExplicitAutograd")
_LIB.impl("cross_entropy_", _cross_entropy_, "CompositeExplicitAutograd")
_LIB.impl("rms_norm", _rms_norm, "CompositeExplicitAutograd")
_LIB.impl("rms_norm_backward", _rms_norm_backward, "CompositeExplicitAutograd")
_LIB.impl("adamw8bit", _adamw8bit, "CompositeExplicitAutograd")


# --- autograd: gather and scatter are each other's backward; a selection has no gradient -----------------------------


def _cosine_score_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)


def _cosine_score_backward(ctx, grad_N):
    return reference.cosine_score_backward(grad_N, *ctx.saved_tensors)


def _select_hard_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(*output)


def _select_hard_backward(ctx, *grads):
    return None, None


def _gather_rows_setup(ctx, inputs, keyword_only_inputs, output):
    hidden, index, carried = inputs
    ctx.save_for_backward(index)
    ctx.shape, ctx.carried, ctx.backend = hidden.shape, len(carried), keyword_only_inputs["backend"]
    ctx.mark_non_differentiable(*output[1])


def _gather_rows_backward(ctx, grad_KD, _carried_grads):
    (index_K,) = ctx.saved_tensors
    zeros_ND = grad_KD.new_zeros(1, ctx.shape[1]).expand(ctx.shape)  # every row is the same one in memory
    grad_ND = torch.ops.cascade_fast.scatter_rows(grad_KD, index_K, zeros_ND, add=False, backend=ctx.backend)
    return grad_ND, None, [None] * ctx.carried


def _scatter_rows_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.add, ctx.backend = keyword_only_inputs["add"], keyword_only_inputs["backend"]


def _scatter_rows_backward(ctx, grad_ND):
    (index_K,) = ctx.saved_tensors
    grad_rows_KD = grad_into_ND = None
    if ctx.needs_input_grad[0]:
        grad_rows_KD, _ = torch.ops.cascade_fast.gather_rows(grad_ND, index_K, [], backend=ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_into_ND = grad_ND
        if not ctx.add:  # a replaced row of `into` reaches no output
            zeros_KD = grad_ND.new_zeros(1, grad_ND.shape[1]).expand(index_K.shape[0], -1)
            grad_into_ND = torch.ops.cascade_fast.scatter_rows(
                zeros_KD, index_K, grad_ND, add=False, backend=ctx.backend
            )
    return grad_rows_KD, None, grad_into_ND


class RMSNorm(torch.autograd.Function):
    """The operator ``rms_norm`` without ``1 / rms``; takes a third of the time of what is registered below."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype, backend: str):
        out_ND, inv_rms_N = _rms_norm(x_ND, weight_D, eps, dtype=dtype, backend=backend)
        ctx.save_for_backward(x_ND, weight_D, inv_rms_N)
        ctx.backend = backend
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND: Tensor):
        x_ND, weight_D, inv_rms_N = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        grads = _rms_norm_backward(grad_ND, x_ND, weight_D, inv_rms_N, wanted, backend=ctx.backend)
        return grads[0], grads[1] if wanted else None, None, None, None


def _rms_norm_setup(ctx, inputs, keyword_only_inputs, output):
    x, weight, _eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.backend = keyword_only_inputs["backend"]
    ctx.mark_non_differentiable(output[1])


def _rms_norm_backward_of(ctx, grad_ND, _inv_rms_grad):
    x_ND, weight_D, inv_rms_N = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    grad_x_ND, grad_weight_D = torch.ops.cascade_fast.rms_norm_backward(
        grad_ND, x_ND, weight_D, inv_rms_N, wanted, backend=ctx.backend
    )
    return grad_x_ND, grad_weight_D if wanted else None, None


torch.library.register_autograd(
    "cascade_fast::cosine_score", _cosine_score_backward, setup_context=_cosine_score_setup, lib=_LIB
)
torch.library.register_autograd(
    "cascade_fast::select_hard", _select_hard_backward, setup_context=_select_hard_setup, lib=_LIB
)
torch.library.register_autograd(
    "cascade_fast::gather_rows", _gather_rows_backward, setup_context=_gather_rows_setup, lib=_LIB
)
torch.library.register_autograd(
    "cascade_fast::scatter_rows", _scatter_rows_backward, setup_context=_scatter_rows_setup, lib=_LIB
)
torch.library.register_autograd(
    "cascade_fast::rms_norm", _rms_norm_backward_of, setup_context=_rms_norm_setup, lib=_LIB
)
