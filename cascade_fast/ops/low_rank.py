"""The narrow products of LoRA updates (arXiv 2106.09685) beside frozen linear layers, and all their gradients at once.

Stated as in ``schema.py``; on the CPU the extension has faster bodies.

Shape legend: K tokens, D inputs, F outputs of a layer, R ranks of all layers of the same inputs, C = D + R.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_fast.ops import backends
from cascade_fast.ops.schema import FLOAT_DTYPES, call, check, shape_of

_LIB = torch.library.Library("cascade_fast", "FRAGMENT")
_LIB.define("low_rank(Tensor x, Tensor a, *, str backend='auto') -> Tensor")
_LIB.define(
    "low_rank_backward(Tensor grad, Tensor both, Tensor a, Tensor[] grads, int[] ranks, float scale, *, "
    "str backend='auto') -> (Tensor, Tensor, Tensor[])"
)


def low_rank(x_KD: Tensor, a_RD: Tensor, *, backend: str = "auto") -> Tensor:
    """``[x | x A^T]``: what a product with ``[W | B]`` takes to ``x W^T + (x A^T) B^T``.

    Args:
        x_KD: ``(K, D)`` float32, float16 or bfloat16; any strides.
        a_RD: ``(R, D)`` of the dtype of ``x``.

    Returns:
        ``(K, D + R)`` of that dtype, contiguous. Not differentiable: see :func:`low_rank_backward`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    return call(_BY_NAME, "low_rank", x_KD, a_RD, backend=backend)


def low_rank_backward(
    grad_KC: Tensor,
    both_KC: Tensor,
    a_RD: Tensor,
    grads: Sequence[Tensor],
    ranks: Sequence[int],
    scale: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What comes back through :func:`low_rank` and the products after it.

    Args:
        grad_KC: the gradient of ``both``.
        both_KC: what :func:`low_rank` has returned.
        a_RD: as there.
        grads: ``(K, F)`` each, the gradients of the layers' outputs, of the dtype of ``both``.
        ranks: of each layer's update; in their order they make up the R columns. 0: it has none.
        scale: of the gradient of A.

    Returns:
        ``grad[:, :D] + grad[:, D:] A``, the gradient of ``x``, in the dtype of ``both``; ``scale * grad[:, D:]^T x``,
        ``(R, D)`` float32; and for each layer ``grads[i]^T low_i``, ``(F, ranks[i])`` float32, of its own columns of
        ``x A^T``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    return call(_BY_NAME, "low_rank_backward", grad_KC, both_KC, a_RD, list(grads), list(ranks), scale, backend=backend)


def _check_low_rank(x: Tensor, a: Tensor) -> None:
    check(x.dim() == 2, lambda: f"x: {shape_of(x)}; must have 2 dimensions (K, D)")
    check(x.dtype in FLOAT_DTYPES, lambda: f"x: {shape_of(x)}; must be float32, float16 or bfloat16")
    good = a.dim() == 2 and a.shape[1] == x.shape[1]
    check(good, lambda: f"a: {shape_of(a)}; must have shape (R, {x.shape[1]})")
    check(a.dtype == x.dtype, lambda: f"a: {shape_of(a)}; must have the dtype of x, {x.dtype}")
    check(a.device == x.device, lambda: f"a: {shape_of(a)}; must be on the device of x, {x.device}")


def _check_low_rank_backward(grad: Tensor, both: Tensor, a: Tensor, grads: list[Tensor], ranks: list[int]) -> None:
    check(a.dim() == 2, lambda: f"a: {shape_of(a)}; must have 2 dimensions (R, D)")
    columns = a.shape[0] + a.shape[1]
    good = both.dim() == 2 and both.shape[1] == columns
    check(good, lambda: f"both: {shape_of(both)}; must have shape (K, {columns})")
    check(both.dtype in FLOAT_DTYPES, lambda: f"both: {shape_of(both)}; must be float32, float16 or bfloat16")
    check(grad.shape == both.shape, lambda: f"grad: {shape_of(grad)}; must have the shape of both, {tuple(both.shape)}")
    check(len(ranks) == len(grads), lambda: f"ranks: {len(ranks)} of them; must be one for each of {len(grads)} grads")
    good = all(rank >= 0 for rank in ranks) and sum(ranks) == a.shape[0]
    check(good, lambda: f"ranks: {list(ranks)}; must be 0 or more, and {a.shape[0]} in all, as a has rows")
    for i, one in enumerate(grads):
        good = one.dim() == 2 and one.shape[0] == both.shape[0]
        check(good, lambda: f"grads[{i}]: {shape_of(one)}; must have shape ({both.shape[0]}, F)")
    for name, t in (("grad", grad), ("a", a), *((f"grads[{i}]", one) for i, one in enumerate(grads))):
        check(t.dtype == both.dtype, lambda: f"{name}: {shape_of(t)}; must have the dtype of both, {both.dtype}")
        check(t.device == both.device, lambda: f"{name}: {shape_of(t)}; must be on the device of both, {both.device}")


@torch.library.register_fake("cascade_fast::low_rank", lib=_LIB)
def _(x, a, *, backend="auto"):
    _check_low_rank(x, a)
    return x.new_empty(x.shape[0], x.shape[1] + a.shape[0])


@torch.library.register_fake("cascade_fast::low_rank_backward", lib=_LIB)
def _(grad, both, a, grads, ranks, scale, *, backend="auto"):
    _check_low_rank_backward(grad, both, a, grads, ranks)
    of_b = [a.new_empty(one.shape[1], rank, dtype=torch.float32) for one, rank in zip(grads, ranks, strict=True)]
    return both.new_empty(both.shape[0], a.shape[1]), a.new_empty(a.shape, dtype=torch.float32), of_b


@torch.no_grad()  # the plain bodies are made of torch's operators
def _low_rank(x: Tensor, a: Tensor, *, backend: str = "auto") -> Tensor:
    _check_low_rank(x, a)
    return backends.body("low_rank", x.device, backend)(x, a)


@torch.no_grad()
def _low_rank_backward(
    grad: Tensor,
    both: Tensor,
    a: Tensor,
    grads: list[Tensor],
    ranks: list[int],
    scale: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_low_rank_backward(grad, both, a, grads, ranks)
    return backends.body("low_rank_backward", both.device, backend)(grad, both, a, grads, ranks, scale)


_BY_NAME: dict[str, Callable[..., Any]] = {"low_rank": _low_rank, "low_rank_backward": _low_rank_backward}
for _name, _body in _BY_NAME.items():
    _LIB.impl(_name, _body, "CompositeExplicitAutograd")
