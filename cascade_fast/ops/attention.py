"""Attention of grouped heads with a mask that is added, and its gradients.

Stated as in ``schema.py``; on the CPU the extension has faster bodies.

Shape legend: B sequences, H heads, G key heads, N = B * G, Q queries of a head, R = (H / G) * Q queries of a key head,
S keys, W = S rounded up to a multiple of 32, E head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cascade_fast.ops import backends
from cascade_fast.ops.reference import attention_width
from cascade_fast.ops.schema import FLOAT_DTYPES, call, check, shape_of

_LIB = torch.library.Library("cascade_fast", "FRAGMENT")
_LIB.define("attention(Tensor query, Tensor key, Tensor value, Tensor mask, *, str backend='auto') -> (Tensor, Tensor)")
_LIB.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor weights, *, "
    "str backend='auto') -> (Tensor, Tensor, Tensor)"
)


def attention(
    query_NRE: Tensor, key_NSE: Tensor, value_NSE: Tensor, mask_B1QS: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``softmax(query key^T + mask) value``, the softmax in float32.

    Args:
        query_NRE: ``(N, R, E)`` float32, float16 or bfloat16, already divided by ``sqrt(E)``. The R queries of a key
            head are those of its first head, then of its second ...
        key_NSE, value_NSE: ``(N, S, E)`` of the query's dtype.
        mask_B1QS: ``(B, 1, Q, S)`` of that dtype, added to the scores; B divides N, Q divides R. Not all of a row
            -inf.

    Returns:
        What is attended to, ``(N, R, E)``, and the weights ``(N, R, W)``, zero from S on; of the query's dtype. With
        no key, zeros. Not differentiable: see :func:`attention_backward`. A NaN reaches the rows of its own key head
        at most; one in a key or value may reach those that do not see it.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    return call(_BY_NAME, "attention", query_NRE, key_NSE, value_NSE, mask_B1QS, backend=backend)


def attention_backward(
    grad_NRE: Tensor,
    query_NRE: Tensor,
    key_NSE: Tensor,
    value_NSE: Tensor,
    mask_B1QS: Tensor,
    weights_NRW: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value in :func:`attention`, in their shapes and dtype.

    Args:
        grad_NRE: the gradient of what was attended to, of its shape and dtype.
        query_NRE, key_NSE, value_NSE, mask_B1QS: as there.
        weights_NRW: what it returned.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    return call(
        _BY_NAME, "attention_backward", grad_NRE, query_NRE, key_NSE, value_NSE, mask_B1QS, weights_NRW, backend=backend
    )


def _check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    check(query.dim() == 3, lambda: f"query: {shape_of(query)}; must have 3 dimensions (N, R, E)")
    check(query.dtype in FLOAT_DTYPES, lambda: f"query: {shape_of(query)}; must be float32, float16 or bfloat16")
    (n, r, e), s = query.shape, key.shape[1] if key.dim() == 3 else 0
    check(tuple(key.shape) == (n, s, e), lambda: f"key: {shape_of(key)}; must have shape ({n}, S, {e})")
    check(value.shape == key.shape, lambda: f"value: {shape_of(value)}; must have the shape of key, {tuple(key.shape)}")
    good = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == s
    good = good and _divides(mask.shape[0], n) and _divides(mask.shape[2], r)
    check(good, lambda: f"mask: {shape_of(mask)}; must have shape (B, 1, Q, {s}), B a divisor of {n} and Q of {r}")
    _check_alike(query, (("key", key), ("value", value), ("mask", mask)))


def _divides(part: int, whole: int) -> bool:
    return whole % part == 0 if part else whole == 0


def _check_alike(query: Tensor, others: tuple[tuple[str, Tensor], ...]) -> None:
    for name, t in others:
        check(t.dtype == query.dtype, lambda: f"{name}: {shape_of(t)}; must have the dtype of query, {query.dtype}")
        check(
            t.device == query.device, lambda: f"{name}: {shape_of(t)}; must be on the device of query, {query.device}"
        )


def _check_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, weights: Tensor
) -> None:
    _check_attention(query, key, value, mask)
    wanted = (*query.shape[:2], attention_width(key.shape[1]))
    check(
        grad.shape == query.shape, lambda: f"grad: {shape_of(grad)}; must have the shape of query, {tuple(query.shape)}"
    )
    check(tuple(weights.shape) == wanted, lambda: f"weights: {shape_of(weights)}; must have shape {wanted}")
    _check_alike(query, (("grad", grad), ("weights", weights)))


@torch.library.register_fake("cascade_fast::attention", lib=_LIB)
def _(query, key, value, mask, *, backend="auto"):
    _check_attention(query, key, value, mask)
    return query.new_empty(query.shape), query.new_empty(*query.shape[:2], attention_width(key.shape[1]))


@torch.library.register_fake("cascade_fast::attention_backward", lib=_LIB)
def _(grad, query, key, value, mask, weights, *, backend="auto"):
    _check_attention_backward(grad, query, key, value, mask, weights)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.no_grad()  # its bodies are made of torch's operators
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    _check_attention(query, key, value, mask)
    return backends.body("attention", query.device, backend)(query, key, value, mask)


@torch.no_grad()
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, weights: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_attention_backward(grad, query, key, value, mask, weights)
    return backends.body("attention_backward", query.device, backend)(grad, query, key, value, mask, weights)


_BY_NAME: dict[str, Callable[..., Any]] = {"attention": _attention, "attention_backward": _attention_backward}
for _name, _body in _BY_NAME.items():
    _LIB.impl(_name, _body, "CompositeExplicitAutograd")
