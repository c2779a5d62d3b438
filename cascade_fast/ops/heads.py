"""Operators around attention on a GPU: heads of tokens to the places where attention reads them, and back, one kernel
each. Stated as in ``schema.py``; on the CPU plain torch alone.

A place n of sequence b has a row of E numbers for each head. Attention takes the T heads of a group as T * N queries of
its one key head, so head g * T + t of place n is row t * N + n of group g.

Shape legend: K tokens, B sequences, Q places of queries of each, S places of keys, H heads, G groups, T = H / G,
E head size, F = E / 2, R = T * Q rows of a group, P = B * G * S rows of one head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cascade_fast.ops import backends
from cascade_fast.ops.schema import FLOAT_DTYPES, check, shape_of

_LIB = torch.library.Library("cascade_fast", "FRAGMENT")
_LIB.define(
    "place_heads(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor slot, Tensor place, "
    "Tensor token_of_slot, Tensor token_of_place, Tensor keys, Tensor values, float scale, *, str backend='auto') -> "
    "(Tensor, Tensor, Tensor)"
)
_LIB.define(
    "place_heads_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, Tensor sin, Tensor slot, "
    "Tensor place, SymInt times, float scale, *, str backend='auto') -> (Tensor, Tensor, Tensor)"
)
_LIB.define("take_heads(Tensor rows, Tensor slot, Tensor token_of_slot, SymInt times, *, str backend='auto') -> Tensor")
_LIB.define("take_heads_backward(Tensor grad, Tensor token_of_slot, SymInt times, *, str backend='auto') -> Tensor")


def place_heads(
    query_KHE: Tensor,
    key_KGE: Tensor,
    value_KGE: Tensor,
    cos_KF: Tensor,
    sin_KF: Tensor,
    slot_K: Tensor,
    place_K: Tensor,
    token_BQ: Tensor,
    token_BS: Tensor,
    keys_PE: Tensor,
    values_PE: Tensor,
    scale: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values where attention reads them: queries and keys turned by their rotary angles (arXiv
    2104.09864, halves as Llama has them), queries times ``scale``, in float32, rounded once.

    Args:
        query_KHE: ``(K, H, E)`` float32, float16 or bfloat16, E even.
        key_KGE, value_KGE: ``(K, G, E)`` of its dtype, G a divisor of H.
        cos_KF, sin_KF: ``(K, E / 2)`` float32.
        slot_K: ``b * Q + q`` of each token, ``(K,)`` int64, none twice.
        place_K: ``b * S + s`` of each token, the same.
        token_BQ, token_BS: the same the other way round, int32: the token that stands there, -1 where none does.
        keys_PE, values_PE: ``(B * G * S, E)`` of the dtype of ``query``, any row stride: those of other places.

    Returns:
        Queries ``(B, G, T * Q, E)``, zero where no token stands, keys and values ``(B, G, S, E)``; contiguous.
        Differentiable in ``query``, ``key`` and ``value``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    args = (query_KHE, key_KGE, value_KGE, cos_KF, sin_KF, slot_K, place_K, token_BQ, token_BS, keys_PE, values_PE)
    if torch.compiler.is_compiling():
        return torch.ops.cascade_fast.place_heads(*args, scale, backend=backend)
    return _PlaceHeads.apply(*args, scale, backend)


def take_heads(rows_BGRE: Tensor, slot_K: Tensor, token_BQ: Tensor, times: int, *, backend: str = "auto") -> Tensor:
    """The heads of the tokens, ``(K, G * times, E)``, from their places.

    Args:
        rows_BGRE: ``(B, G, times * Q, E)`` float32, float16 or bfloat16; any strides.
        slot_K, token_BQ: see :func:`place_heads`.

    Returns:
        ``(K, H, E)``, contiguous. Differentiable in ``rows``, whose gradient lies in memory as ``(B, R, G, E)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; names the argument.
    """
    if torch.compiler.is_compiling():
        return torch.ops.cascade_fast.take_heads(rows_BGRE, slot_K, token_BQ, times, backend=backend)
    return _TakeHeads.apply(rows_BGRE, slot_K, token_BQ, times, backend)


# --- argument rules ---------------------------------------------------------------------------------------------------


def _check_index(name: str, t: Tensor, tokens: int) -> None:
    good = t.dtype == torch.int64 and tuple(t.shape) == (tokens,)
    check(good, lambda: f"{name}: {shape_of(t)}; must be int64 of shape ({tokens},), one for each token")


def _check_map(name: str, t: Tensor, rows: int | None = None) -> None:
    good = t.dtype == torch.int32 and t.dim() == 2 and rows in (None, t.shape[0])
    wanted = "2 dimensions" if rows is None else f"{rows} rows"
    check(good, lambda: f"{name}: {shape_of(t)}; must be int32 with {wanted}, a row for each sequence")


def _check_device(like: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        check(t.device == like.device, lambda: f"{name}: {shape_of(t)}; must be on {like.device}")


def _check_place_heads(query, key, value, cos, sin, slot, place, token_of_slot, token_of_place, keys, values) -> None:
    check(query.dim() == 3, lambda: f"query: {shape_of(query)}; must have 3 dimensions (K, H, E)")
    check(query.dtype in FLOAT_DTYPES, lambda: f"query: {shape_of(query)}; must be float32, float16 or bfloat16")
    tokens, heads, size = query.shape
    check(size % 2 == 0, lambda: f"query: {shape_of(query)}; must have heads of an even size")
    for name, t in (("key", key), ("value", value)):
        good = t.dim() == 3 and (t.shape[0], t.shape[2]) == (tokens, size) and t.dtype == query.dtype
        good = good and t.shape[1] > 0 and heads % t.shape[1] == 0 and t.shape == key.shape
        check(
            good, lambda: f"{name}: {shape_of(t)}; must be like query, {shape_of(query)}, with a divisor of its heads"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        good = tuple(t.shape) == (tokens, size // 2) and t.dtype == torch.float32
        check(good, lambda: f"{name}: {shape_of(t)}; must be float32 of shape ({tokens}, {size // 2})")
    _check_index("slot", slot, tokens)
    _check_index("place", place, tokens)
    _check_map("token_of_slot", token_of_slot)
    _check_map("token_of_place", token_of_place, token_of_slot.shape[0])
    rows = token_of_place.numel() * key.shape[1]
    for name, t in (("keys", keys), ("values", values)):
        good = tuple(t.shape) == (rows, size) and t.dtype == query.dtype
        check(good, lambda: f"{name}: {shape_of(t)}; must have shape ({rows}, {size}) and the dtype of query")
    _check_device(
        query, key=key, value=value, cos=cos, sin=sin, slot=slot, place=place, token_of_slot=token_of_slot,
        token_of_place=token_of_place, keys=keys, values=values,
    )  # fmt: skip


def _check_take_heads(rows: Tensor, slot: Tensor, token_of_slot: Tensor, times: int) -> None:
    check(rows.dim() == 4, lambda: f"rows: {shape_of(rows)}; must have 4 dimensions (B, G, R, E)")
    check(rows.dtype in FLOAT_DTYPES, lambda: f"rows: {shape_of(rows)}; must be float32, float16 or bfloat16")
    check(rows.shape[3] % 2 == 0, lambda: f"rows: {shape_of(rows)}; must have heads of an even size")
    _check_index("slot", slot, slot.shape[0])
    _check_map("token_of_slot", token_of_slot, rows.shape[0])
    wanted = times * token_of_slot.shape[1]
    check(rows.shape[2] == wanted, lambda: f"rows: {shape_of(rows)}; must have {wanted} rows a group, times * Q")
    _check_device(rows, slot=slot, token_of_slot=token_of_slot)


# --- fakes and bodies -------------------------------------------------------------------------------------------------


@torch.library.register_fake("cascade_fast::place_heads", lib=_LIB)
def _(query, key, value, cos, sin, slot, place, token_of_slot, token_of_place, keys, values, scale, *, backend="auto"):
    _check_place_heads(query, key, value, cos, sin, slot, place, token_of_slot, token_of_place, keys, values)
    (sequences, queries), (_, heads, size), groups = token_of_slot.shape, query.shape, key.shape[1]
    of_keys = (sequences, groups, token_of_place.shape[1], size)
    return (
        query.new_empty(sequences, groups, heads // groups * queries, size),
        query.new_empty(of_keys),
        query.new_empty(of_keys),
    )


@torch.library.register_fake("cascade_fast::place_heads_backward", lib=_LIB)
def _(grad_query, grad_key, grad_value, cos, sin, slot, place, times, scale, *, backend="auto"):
    tokens, groups, size = slot.shape[0], grad_key.shape[1], grad_key.shape[3]
    return tuple(grad_query.new_empty(tokens, heads, size) for heads in (groups * times, groups, groups))


@torch.library.register_fake("cascade_fast::take_heads", lib=_LIB)
def _(rows, slot, token_of_slot, times, *, backend="auto"):
    _check_take_heads(rows, slot, token_of_slot, times)
    return rows.new_empty(slot.shape[0], rows.shape[1] * times, rows.shape[3])


@torch.library.register_fake("cascade_fast::take_heads_backward", lib=_LIB)
def _(grad, token_of_slot, times, *, backend="auto"):
    sequences, queries = token_of_slot.shape
    return grad.new_empty(sequences, times * queries, grad.shape[1] // times, grad.shape[2]).transpose(1, 2)


def _place_heads(
    query, key, value, cos, sin, slot, place, token_of_slot, token_of_place, keys, values, scale, *, backend="auto"
) -> tuple[Tensor, Tensor, Tensor]:
    _check_place_heads(query, key, value, cos, sin, slot, place, token_of_slot, token_of_place, keys, values)
    run = backends.body("place_heads", query.device, backend)
    return run(query, key, value, cos, sin, token_of_slot, token_of_place, keys, values, scale)


def _place_heads_backward(
    grad_query, grad_key, grad_value, cos, sin, slot, place, times, scale, *, backend="auto"
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.body("place_heads_backward", grad_query.device, backend)
    return run(grad_query, grad_key, grad_value, cos, sin, slot, place, times, scale)


def _take_heads(rows: Tensor, slot: Tensor, token_of_slot: Tensor, times: int, *, backend: str = "auto") -> Tensor:
    _check_take_heads(rows, slot, token_of_slot, times)
    return backends.body("take_heads", rows.device, backend)(rows, slot, times)


def _take_heads_backward(grad: Tensor, token_of_slot: Tensor, times: int, *, backend: str = "auto") -> Tensor:
    return backends.body("take_heads_backward", grad.device, backend)(grad, token_of_slot, times)


for _body in (_place_heads, _place_heads_backward, _take_heads, _take_heads_backward):
    _LIB.impl(_body.__name__[1:], _body, "CompositeExplicitAutograd")


# --- autograd: as Functions too, as in layers.py ----------------------------------------------------------------------


class _PlaceHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args: Any):
        *inputs, scale, backend = args
        ctx.save_for_backward(*inputs[3:7])
        ctx.how = inputs[0].shape[1] // inputs[1].shape[1], scale
        ctx.backend = backend
        place: Callable[..., Any] = _place_heads
        return place(*inputs, scale, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        return *_place_heads_backward(*grads, *ctx.saved_tensors, *ctx.how, backend=ctx.backend), *[None] * 10


class _TakeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_BGRE: Tensor, slot_K: Tensor, token_BQ: Tensor, times: int, backend: str):
        ctx.save_for_backward(token_BQ)
        ctx.times, ctx.backend = times, backend
        return _take_heads(rows_BGRE, slot_K, token_BQ, times, backend=backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_KHE: Tensor):
        (token_BQ,) = ctx.saved_tensors
        grad = _take_heads_backward(grad_KHE, token_BQ, ctx.times, backend=ctx.backend)
        return grad, None, None, None, None


def _place_heads_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs[3:7])
    ctx.how = inputs[0].shape[1] // inputs[1].shape[1], inputs[11]
    ctx.backend = keyword_only_inputs["backend"]


def _place_heads_grads(ctx, *grads):
    op = torch.ops.cascade_fast.place_heads_backward
    return *op(*grads, *ctx.saved_tensors, *ctx.how, backend=ctx.backend), *[None] * 9


def _take_heads_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(inputs[2])
    ctx.times, ctx.backend = inputs[3], keyword_only_inputs["backend"]


def _take_heads_grads(ctx, grad):
    op = torch.ops.cascade_fast.take_heads_backward
    return op(grad, *ctx.saved_tensors, ctx.times, backend=ctx.backend), None, None, None


torch.library.register_autograd(
    "cascade_fast::place_heads", _place_heads_grads, setup_context=_place_heads_setup, lib=_LIB
)
torch.library.register_autograd(
    "cascade_fast::take_heads", _take_heads_grads, setup_context=_take_heads_setup, lib=_LIB
)
