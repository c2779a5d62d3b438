"""Operators of a decoder layer: sum and norm, the gated MLP's product, rotary positions.

Stated as in ``schema.py``; on the CPU the extension has faster bodies.

Shape legend: N tokens, F intermediate size, K tokens, H heads, E head size, P rows of one head, Y = K * H.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_fast.ops import backends
from cascade_fast.ops.schema import FLOAT_DTYPES, _check_rms_norm, check, shape_of

_LIB = torch.library.Library("cascade_fast", "FRAGMENT")
_LIB.define(
    "add_rms_norm(Tensor x, Tensor added, Tensor weight, float eps, *, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "add_rms_norm_backward(Tensor grad_sum, Tensor grad, Tensor sum, Tensor weight, Tensor inv_rms, "
    "bool weight_grad=True, *, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
_LIB.define("scale_into_(Tensor(a!)[] into, Tensor[] values, float scale, *, str backend='auto') -> ()")
_LIB.define("silu_mul(Tensor gate, Tensor up, *, str backend='auto') -> Tensor")
_LIB.define("silu_mul_backward(Tensor grad, Tensor gate, Tensor up, *, str backend='auto') -> (Tensor, Tensor)")
_LIB.define("rotate_rows(Tensor x, Tensor cos, Tensor sin, Tensor index, Tensor into, *, str backend='auto') -> Tensor")
_LIB.define(
    "rotate_rows_backward(Tensor grad, Tensor cos, Tensor sin, Tensor index, SymInt heads, SymInt tokens, "
    "*, str backend='auto') -> Tensor"
)


def add_rms_norm(
    x_ND: Tensor, added_ND: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``x + added``, and its norm ``weight * sum / sqrt(mean(sum^2) + eps)``, in one pass, in float32.

    Args:
        x_ND: ``(N, D)`` float32; any strides.
        added_ND: ``(N, D)`` float32, float16 or bfloat16.
        weight_D: ``(D,)`` float32.
        eps: added to the mean square.

    Returns:
        The sum ``(N, D)``, float32, and the normed sum in the dtype of ``added``. Differentiable in ``x``, ``added``
        and ``weight``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    if torch.compiler.is_compiling():
        return torch.ops.cascade_fast.add_rms_norm(x_ND, added_ND, weight_D, eps, backend=backend)[:2]
    return _AddRMSNorm.apply(x_ND, added_ND, weight_D, eps, backend)


def scale_into_(into: Sequence[Tensor], values: Sequence[Tensor], scale: float, *, backend: str = "auto") -> None:
    """``into[i] = values[i] * scale`` for many small matrices in one call, in float32, rounded once.

    Args:
        into: ``(N, D)`` each, of one dtype of float32, float16, bfloat16; rows contiguous. Overwritten.
        values: float32, contiguous, in the shapes of ``into``.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not match; names the argument.
    """
    _op("scale_into_")(list(into), list(values), scale, backend=backend)


def silu_mul(gate_NF: Tensor, up_NF: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``, the product of a gated MLP (arXiv 2002.05202), in float32, rounded once.

    Args:
        gate_NF, up_NF: ``(N, F)``, one dtype of float32, float16, bfloat16; any strides.

    Returns:
        ``(N, F)`` of their dtype. Differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    if torch.compiler.is_compiling():
        return torch.ops.cascade_fast.silu_mul(gate_NF, up_NF, backend=backend)
    return _SiluMul.apply(gate_NF, up_NF, backend)


def rotate_rows(
    x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, into_PE: Tensor, *, backend: str = "auto"
) -> Tensor:
    """A copy of ``into`` in whose rows ``index`` the heads of ``x`` stand, turned by their rotary angles
    (arXiv 2104.09864, halves as Llama has them), in float32, rounded once.

    Args:
        x_KHE: ``(K or more, H, E)`` float32, float16 or bfloat16, E even. What is beyond K tokens is placed nowhere.
        cos_KF, sin_KF: ``(K, E / 2)`` float32; both empty: nothing is turned.
        index_Y: ``(K * H,)`` int64 in ``[0, P)``, no index twice.
        into_PE: ``(P, E)`` of the dtype of ``x``; not modified. Not read where every row is replaced.

    Returns:
        ``(P, E)``, contiguous. Differentiable in ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
        IndexError: on the CPU, an index outside ``[0, P)``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _op("rotate_rows")(x_KHE, cos_KF, sin_KF, index_Y, into_PE, backend=backend)
    return _RotateRows.apply(x_KHE, cos_KF, sin_KF, index_Y, into_PE, backend)


def rotate_rows_backward(
    grad_PE: Tensor,
    cos_KF: Tensor,
    sin_KF: Tensor,
    index_Y: Tensor,
    heads: int,
    tokens: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """The gradient of ``x`` in :func:`rotate_rows`: rows taken back as ``(tokens, heads, E)`` and turned back; zero of
    tokens beyond K. With empty angles it gathers heads."""
    return _op("rotate_rows_backward")(grad_PE, cos_KF, sin_KF, index_Y, heads, tokens, backend=backend)


# --- argument rules ---------------------------------------------------------------------------------------------------


def _check_alike(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    check(
        t.shape == other.shape,
        lambda: f"{name}: {shape_of(t)}; must have the shape of {other_name}, {tuple(other.shape)}",
    )
    check(t.dtype == other.dtype, lambda: f"{name}: {shape_of(t)}; must have the dtype of {other_name}, {other.dtype}")
    check(
        t.device == other.device,
        lambda: f"{name}: {shape_of(t)}; must be on the device of {other_name}, {other.device}",
    )


def _check_float(name: str, t: Tensor) -> None:
    check(t.dtype in FLOAT_DTYPES, lambda: f"{name}: {shape_of(t)}; must be float32, float16 or bfloat16")


def _check_add_rms_norm(x: Tensor, added: Tensor, weight: Tensor) -> None:
    _check_rms_norm(x, weight, added.dtype)
    check(added.shape == x.shape, lambda: f"added: {shape_of(added)}; must have the shape of x, {tuple(x.shape)}")
    check(added.device == x.device, lambda: f"added: {shape_of(added)}; must be on the device of x, {x.device}")


def _check_scale_into(into: list[Tensor], values: list[Tensor]) -> None:
    check(len(into) == len(values), lambda: f"values: {len(values)} of them; must be one for each of {len(into)} into")
    for i, (out, value) in enumerate(zip(into, values, strict=True)):
        check(out.dim() == 2 and out.stride(1) == 1, lambda: f"into[{i}]: {shape_of(out)}; must have contiguous rows")
        check(out.dtype == into[0].dtype, lambda: f"into[{i}]: {shape_of(out)}; must have the dtype of into[0]")
        _check_float(f"into[{i}]", out)
        check(value.shape == out.shape, lambda: f"values[{i}]: {shape_of(value)}; must have shape {tuple(out.shape)}")
        good = value.dtype == torch.float32 and value.is_contiguous() and value.device == out.device
        check(good, lambda: f"values[{i}]: {shape_of(value)}; must be contiguous float32 on {out.device}")


def _check_silu_mul(gate: Tensor, up: Tensor) -> None:
    check(gate.dim() == 2, lambda: f"gate: {shape_of(gate)}; must have 2 dimensions (N, F)")
    _check_float("gate", gate)
    _check_alike("up", up, "gate", gate)


def _check_rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, index: Tensor, into: Tensor) -> None:
    check(x.dim() == 3, lambda: f"x: {shape_of(x)}; must have 3 dimensions (K, H, E)")
    _check_float("x", x)
    rows, heads, size = x.shape
    check(heads > 0, lambda: f"x: {shape_of(x)}; must have at least one head")
    check(index.dtype == torch.int64, lambda: f"index: {shape_of(index)}; must be int64")
    good = index.dim() == 1 and index.shape[0] <= rows * heads and index.shape[0] % heads == 0
    check(good, lambda: f"index: {shape_of(index)}; must have {heads} entries for each of at most {rows} tokens")
    k = index.shape[0] // heads
    check(size % 2 == 0, lambda: f"x: {shape_of(x)}; must have heads of an even size")
    check(into.dim() == 2 and into.shape[1] == size, lambda: f"into: {shape_of(into)}; must have shape (P, {size})")
    check(into.dtype == x.dtype, lambda: f"into: {shape_of(into)}; must have the dtype of x, {x.dtype}")
    for name, angles in (("cos", cos), ("sin", sin)):
        good = angles.numel() == 0 or tuple(angles.shape) == (k, size // 2)
        check(good, lambda: f"{name}: {shape_of(angles)}; must have shape ({k}, {size // 2}), or be empty")
        check(angles.dtype == torch.float32, lambda: f"{name}: {shape_of(angles)}; must be float32")
    check(cos.shape == sin.shape, lambda: f"sin: {shape_of(sin)}; must have the shape of cos, {tuple(cos.shape)}")
    for name, t in (("cos", cos), ("sin", sin), ("index", index), ("into", into)):
        check(t.device == x.device, lambda: f"{name}: {shape_of(t)}; must be on the device of x, {x.device}")


# --- fakes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("cascade_fast::add_rms_norm", lib=_LIB)
def _(x, added, weight, eps, *, backend="auto"):
    _check_add_rms_norm(x, added, weight)
    return x.new_empty(x.shape), added.new_empty(x.shape), x.new_empty(x.shape[0])


@torch.library.register_fake("cascade_fast::add_rms_norm_backward", lib=_LIB)
def _(grad_sum, grad, sum, weight, inv_rms, weight_grad=True, *, backend="auto"):
    return sum.new_empty(sum.shape), grad.new_empty(sum.shape), weight.new_empty(weight.shape if weight_grad else 0)


@torch.library.register_fake("cascade_fast::scale_into_", lib=_LIB)
def _(into, values, scale, *, backend="auto"):
    _check_scale_into(into, values)


@torch.library.register_fake("cascade_fast::silu_mul", lib=_LIB)
def _(gate, up, *, backend="auto"):
    _check_silu_mul(gate, up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("cascade_fast::silu_mul_backward", lib=_LIB)
def _(grad, gate, up, *, backend="auto"):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@torch.library.register_fake("cascade_fast::rotate_rows", lib=_LIB)
def _(x, cos, sin, index, into, *, backend="auto"):
    _check_rotate_rows(x, cos, sin, index, into)
    return into.new_empty(into.shape)


@torch.library.register_fake("cascade_fast::rotate_rows_backward", lib=_LIB)
def _(grad, cos, sin, index, heads, tokens, *, backend="auto"):
    return grad.new_empty(tokens, heads, grad.shape[1])


# --- bodies -----------------------------------------------------------------------------------------------------------


def _add_rms_norm(
    x: Tensor, added: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_add_rms_norm(x, added, weight)
    return backends.body("add_rms_norm", x.device, backend)(x, added, weight, eps)


def _add_rms_norm_backward(
    grad_sum: Tensor,
    grad: Tensor,
    sum: Tensor,
    weight: Tensor,
    inv_rms: Tensor,
    weight_grad: bool = True,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.body("add_rms_norm_backward", sum.device, backend)
    return run(grad_sum, grad, sum, weight, inv_rms, weight_grad)


def _scale_into_(into: list[Tensor], values: list[Tensor], scale: float, *, backend: str = "auto") -> None:
    _check_scale_into(into, values)
    if into:
        backends.body("scale_into_", into[0].device, backend)(into, values, scale)


def _silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    _check_silu_mul(gate, up)
    return backends.body("silu_mul", gate.device, backend)(gate, up)


def _silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return backends.body("silu_mul_backward", gate.device, backend)(grad, gate, up)


def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, index: Tensor, into: Tensor, *, backend: str = "auto") -> Tensor:
    _check_rotate_rows(x, cos, sin, index, into)
    return backends.body("rotate_rows", x.device, backend)(x, cos, sin, index, into)


def _rotate_rows_backward(
    grad: Tensor, cos: Tensor, sin: Tensor, index: Tensor, heads: int, tokens: int, *, backend: str = "auto"
) -> Tensor:
    return backends.body("rotate_rows_backward", grad.device, backend)(grad, cos, sin, index, heads, tokens)


_BODIES = (
    _add_rms_norm, _add_rms_norm_backward, _scale_into_, _silu_mul, _silu_mul_backward,
    _rotate_rows, _rotate_rows_backward,
)  # fmt: skip
_BY_NAME = {body.__name__[1:]: body for body in _BODIES}
for _name, _body in _BY_NAME.items():
    _LIB.impl(_name, _body, "CompositeExplicitAutograd")


def _op(name: str) -> Callable[..., Any]:
    """The operator; where no gradient is asked for its body at once, since torch's way there takes longer than some
    bodies do."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return getattr(torch.ops.cascade_fast, name)
    return _BY_NAME[name]


# --- autograd: as Functions too, which take a third of the time of what is registered ---------------------------------


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, added_ND: Tensor, weight_D: Tensor, eps: float, backend: str):
        sum_ND, out_ND, inv_rms_N = _add_rms_norm(x_ND, added_ND, weight_D, eps, backend=backend)
        ctx.save_for_backward(sum_ND, weight_D, inv_rms_N)
        ctx.backend = backend
        return sum_ND, out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum_ND: Tensor, grad_ND: Tensor):
        (sum_ND, weight_D, inv_rms_N), wanted = ctx.saved_tensors, ctx.needs_input_grad[2]
        *grads, of_weight_D = _add_rms_norm_backward(
            grad_sum_ND, grad_ND, sum_ND, weight_D, inv_rms_N, wanted, backend=ctx.backend
        )
        return *grads, of_weight_D if wanted else None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_NF: Tensor, up_NF: Tensor, backend: str):
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.backend = backend
        return _silu_mul(gate_NF, up_NF, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NF: Tensor):
        return *_silu_mul_backward(grad_NF, *ctx.saved_tensors, backend=ctx.backend), None


class _RotateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_KHE: Tensor, cos_KF: Tensor, sin_KF: Tensor, index_Y: Tensor, into_PE: Tensor, backend: str):
        ctx.save_for_backward(cos_KF, sin_KF, index_Y)
        ctx.shape, ctx.backend = x_KHE.shape, backend
        return _rotate_rows(x_KHE, cos_KF, sin_KF, index_Y, into_PE, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_PE: Tensor):
        (cos, sin, index), (tokens, heads, _) = ctx.saved_tensors, ctx.shape
        grad = _rotate_rows_backward(grad_PE, cos, sin, index, heads, tokens, backend=ctx.backend)
        return grad, None, None, None, None, None


def _add_rms_norm_setup(ctx, inputs, keyword_only_inputs, output):
    _x, _added, weight, _eps = inputs
    ctx.save_for_backward(output[0], weight, output[2])
    ctx.backend = keyword_only_inputs["backend"]
    ctx.mark_non_differentiable(output[2])


def _add_rms_norm_grads(ctx, grad_sum_ND, grad_ND, _inv_rms_grad):
    wanted = ctx.needs_input_grad[2]
    *grads, of_weight_D = torch.ops.cascade_fast.add_rms_norm_backward(
        grad_sum_ND, grad_ND, *ctx.saved_tensors, wanted, backend=ctx.backend
    )
    return *grads, of_weight_D if wanted else None, None


def _silu_mul_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.backend = keyword_only_inputs["backend"]


def _silu_mul_grads(ctx, grad_NF):
    return torch.ops.cascade_fast.silu_mul_backward(grad_NF, *ctx.saved_tensors, backend=ctx.backend)


def _rotate_rows_setup(ctx, inputs, keyword_only_inputs, output):
    x, cos, sin, index, _into = inputs
    ctx.save_for_backward(cos, sin, index)
    ctx.shape, ctx.backend = x.shape, keyword_only_inputs["backend"]


def _rotate_rows_grads(ctx, grad_PE):
    cos, sin, index = ctx.saved_tensors
    tokens, heads, _ = ctx.shape
    grad = torch.ops.cascade_fast.rotate_rows_backward(grad_PE, cos, sin, index, heads, tokens, backend=ctx.backend)
    return grad, None, None, None, None


torch.library.register_autograd(
    "cascade_fast::add_rms_norm", _add_rms_norm_grads, setup_context=_add_rms_norm_setup, lib=_LIB
)
torch.library.register_autograd("cascade_fast::silu_mul", _silu_mul_grads, setup_context=_silu_mul_setup, lib=_LIB)
torch.library.register_autograd(
    "cascade_fast::rotate_rows", _rotate_rows_grads, setup_context=_rotate_rows_setup, lib=_LIB
)
