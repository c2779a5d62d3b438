"""Operators of an optimizer's step that have kernels for GPUs alone: elsewhere torch's own do as well.

Stated as in ``schema.py``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_fast.ops import backends
from cascade_fast.ops.schema import FLOAT_DTYPES, check, shape_of

_LIB = torch.library.Library("cascade_fast", "FRAGMENT")
_LIB.define("grad_norm(Tensor[] grads, Tensor? scale, float clip, *, str backend='auto') -> (Tensor, Tensor, Tensor)")
_LIB.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, *, float lr, float beta1, float beta2, float eps, float weight_decay, Tensor? lr_now=None, "
    "Tensor? grad_scale=None, Tensor? found_inf=None, str backend='auto') -> ()"
)


def grad_norm(
    grads: Sequence[Tensor], scale: Tensor | None, clip: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The 2-norm of all gradients of a loss times ``scale``, and what follows from it for the step.

    Args:
        grads: one or more, float32, float16 or bfloat16, any shapes and strides.
        scale: ``()`` float32, which the loss was multiplied by; None: 1.
        clip: the largest norm that gradients of the loss itself keep; 0: no limit.

    Returns:
        Three ``()`` float32, summed in one order whatever the run: ``norm``, still scaled; ``factor``, which the
        gradients are to be divided by, ``max(scale, (norm + 1e-6 scale) / clip)``; ``found_inf``, 1 where ``norm`` is
        not finite, else 0.

    Raises:
        ValueError: no gradients, dtypes or devices that do not match; names the argument.
        RuntimeError: ``backend`` asked for by name cannot run here.
    """
    return torch.ops.cascade_fast.grad_norm(list(grads), scale, clip, backend=backend)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_now: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW (arXiv 1711.05101) in place, as torch's fused AdamW makes it, with copies in 16 bit.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g^2``, ``p = (1 - lr weight_decay) p - lr /
    (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)`` in float32. No GPU body waits for the device.

    Args:
        params: contiguous float32, any shape; changed.
        grads: like ``params``, or float16 or bfloat16; any strides.
        exp_avgs, exp_avg_sqs: the moments m and v, contiguous float32 in the parameters' shapes; changed.
        steps: ``()`` float32 on the parameters' device, how many there were before this one; changed. No two are one.
        copies: float16 or bfloat16 in the parameters' shapes, contiguous, which get the new parameters rounded; empty
            for a parameter without a copy.
        lr_now: ``()`` float32, takes the place of ``lr``: for a rate that the host does not know.
        grad_scale, found_inf: ``()`` float32. Gradients are divided by ``grad_scale`` (up to 1e15); nothing is changed
            unless ``found_inf`` is 0.

    Raises:
        ValueError: a shape, dtype, device or memory layout that does not fit; names the argument.
        RuntimeError: ``backend`` asked for by name cannot run here.
    """
    torch.ops.cascade_fast.adamw_(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(copies),
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        lr_now=lr_now, grad_scale=grad_scale, found_inf=found_inf, backend=backend,
    )  # fmt: skip


# --- argument rules ---------------------------------------------------------------------------------------------------


def _check_number(name: str, value: Tensor | None, device: torch.device) -> None:
    if value is not None:
        good = value.shape == () and value.dtype == torch.float32 and value.device == device
        check(good, lambda: f"{name}: {shape_of(value)}; must be one float32 number () on {device}")


def _check_grads(grads: list[Tensor], device: torch.device) -> None:
    for i, grad in enumerate(grads):
        good = grad.dtype in FLOAT_DTYPES and grad.device == device
        check(good, lambda: f"grads[{i}]: {shape_of(grad)}; must be float32, float16 or bfloat16 on {device}")


def _check_grad_norm(grads: list[Tensor], scale: Tensor | None, clip: float) -> None:
    check(len(grads) > 0, lambda: "grads: none; must be one or more")
    _check_grads(grads, grads[0].device)
    _check_number("scale", scale, grads[0].device)
    check(clip >= 0, lambda: f"clip: {clip}; must be 0 or more")


def _check_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    **numbers: Tensor | None,
) -> None:
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, values in {"grads": grads, **states, "steps": steps, "copies": copies}.items():
        check(
            len(values) == len(params),
            lambda: f"{name}: {len(values)} of them; must be one for each of {len(params)} params",
        )
    if not params:
        return
    device = params[0].device
    _check_grads(grads, device)
    for i, param in enumerate(params):
        for name, tensor in (("params", param), *((name, values[i]) for name, values in states.items())):
            good = tensor.dtype == torch.float32 and tensor.device == device and tensor.is_contiguous()
            check(
                good and tensor.shape == param.shape,
                lambda: (
                    f"{name}[{i}]: {shape_of(tensor)}, strides {tensor.stride()}; must be contiguous float32 on "
                    f"{device} in the shape of params[{i}], {tuple(param.shape)}"
                ),
            )
        check(
            grads[i].shape == param.shape,
            lambda: f"grads[{i}]: {shape_of(grads[i])}; must have shape {tuple(param.shape)}",
        )
        _check_number(f"steps[{i}]", steps[i], device)
        copy = copies[i]
        good = copy.shape == param.shape and copy.dtype in FLOAT_DTYPES[1:] and copy.is_contiguous()
        check(
            copy.numel() == 0 or (good and copy.device == device),
            lambda: (
                f"copies[{i}]: {shape_of(copy)}, strides {copy.stride()}; must be empty, or contiguous float16 or "
                f"bfloat16 on {device} in the shape of params[{i}], {tuple(param.shape)}"
            ),
        )
    for name, value in numbers.items():
        _check_number(name, value, device)


# --- fakes and bodies -------------------------------------------------------------------------------------------------


@torch.library.register_fake("cascade_fast::grad_norm", lib=_LIB)
def _(grads, scale, clip, *, backend="auto"):
    _check_grad_norm(grads, scale, clip)
    return tuple(grads[0].new_empty((), dtype=torch.float32) for _ in range(3))


@torch.library.register_fake("cascade_fast::adamw_", lib=_LIB)
def _(params, grads, exp_avgs, exp_avg_sqs, steps, copies, *, lr, beta1, beta2, eps, weight_decay, lr_now=None,
      grad_scale=None, found_inf=None, backend="auto"):  # fmt: skip
    numbers = {"lr_now": lr_now, "grad_scale": grad_scale, "found_inf": found_inf}
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, copies, **numbers)


def _grad_norm(
    grads: list[Tensor], scale: Tensor | None, clip: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_grad_norm(grads, scale, clip)
    return backends.body("grad_norm", grads[0].device, backend)(grads, scale, clip)


def _adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_now: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    numbers = {"lr_now": lr_now, "grad_scale": grad_scale, "found_inf": found_inf}
    _check_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, copies, **numbers)
    if params:
        step = backends.body("adamw_", params[0].device, backend)
        settings = (lr, beta1, beta2, eps, weight_decay)
        step(params, grads, exp_avgs, exp_avg_sqs, steps, copies, *settings, *numbers.values())


_LIB.impl("grad_norm", _grad_norm, "CompositeExplicitAutograd")
_LIB.impl("adamw_", _adamw_, "CompositeExplicitAutograd")
