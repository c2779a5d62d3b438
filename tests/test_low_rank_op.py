"""The operators of low-rank updates, ``low_rank`` and ``low_rank_backward``: against float64, odd and empty shapes,
every dtype, any strides, special values; and the tiles that both they and attention compute with in bfloat16 on a
processor with AMX: that they read nothing beyond their inputs and leave oneDNN's products alone. What all operators of
a layer must do (opcheck, equal bits for any number of threads, backends asked for by name) is in ``test_layer_ops.py``.

Where D or an F is no multiple of 32, bfloat16 goes by vectors on every processor: both ways are tested on one with AMX.

Shape legend: K tokens, D inputs, F outputs of a layer, R ranks of all layers of the same inputs, C = D + R.
"""

import ctypes
import mmap
import sys
import threading

import op_cases as cases
import pytest
import torch
from layer_op_cases import DTYPES, INF, NAN, assert_rounded_once, attention_inputs, bits_equal, low_rank_inputs, strided

from cascade_fast import ops

# (K, D, ranks, all F). By tiles in bfloat16, both ways:
TILED = (
    (0, 32, (4,), (32,)), (1, 32, (1,), (32,)), (5, 64, (16,), (96,)), (16, 32, (17,), (64,)),
    (17, 96, (8, 0, 4), (64, 32, 96)), (31, 64, (64,), (32,)), (32, 128, (0,), (32,)),
    (33, 32, (16, 16, 16), (96, 64, 64)), (70, 160, (4, 31), (64, 32)), (70, 64, (4,), (0,)), (31, 0, (4,), (32,)),
    (4, 32, (), ()),
)  # fmt: skip
# By vectors, both ways or backward:
OTHERS = (
    (0, 5, (4,), (7,)), (1, 1, (1,), (1,)), (5, 33, (17,), (31,)), (17, 48, (16,), (32,)),
    (33, 70, (8, 0, 4), (5, 33, 70)), (70, 65, (64,), (33,)), (32, 100, (0, 0), (40, 64)), (33, 64, (16,), (40,)),
    (16, 7, (4,), (32,)),
)  # fmt: skip


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return cases.need(request.param)


def _run(x, a, grad, grads, ranks, scale=1.0, backend="auto"):
    """``both`` and all gradients."""
    both = ops.low_rank(x, a, backend=backend)
    of_x, of_a, of_b = ops.low_rank_backward(grad, both, a, grads, ranks, scale, backend=backend)
    return both, of_x, of_a, *of_b


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TILED + OTHERS, ids=str)
def test_products_and_gradients(backend, shape, dtype):
    k, d, ranks, outputs = shape
    x, a, grad, grads = low_rank_inputs(k, d, ranks, outputs, dtype)
    kept = [t.clone() for t in (x, a, grad, *grads)]
    both, of_x, of_a, *of_b = _run(x, a, grad, grads, ranks, 0.5, backend)
    assert bits_equal((x, a, grad, *grads), kept)
    assert both.is_contiguous()
    assert torch.equal(both[:, :d], x)
    # float32 sums: what they may lose is a share of the sum of their terms' sizes.
    wide_x, wide_a, wide_grad = x.double(), a.double(), grad.double()
    sizes = wide_x.abs() @ wide_a.abs().T
    assert_rounded_once(both[:, d:], wide_x @ wide_a.T, dtype, atol=1e-6 * (1 + sizes))
    # From here on of `low` as it was rounded: it is an input.
    low, low_grad = both[:, d:].double(), wide_grad[:, d:]
    once = 0 if backend == "cpp" else torch.finfo(dtype).eps  # the plain body rounds products before it adds or widens
    sizes = wide_grad[:, :d].abs() + low_grad.abs() @ wide_a.abs()
    assert_rounded_once(of_x, wide_grad[:, :d] + low_grad @ wide_a, dtype, atol=(once + 1e-6) * (1 + sizes))
    sizes = low_grad.abs().T @ wide_x.abs()
    assert_rounded_once(of_a, 0.5 * low_grad.T @ wide_x, torch.float32, atol=(once + 1e-6) * (1 + sizes))
    assert len(of_b) == len(outputs)
    for ours, one, part in zip(of_b, grads, low.split(ranks, dim=1), strict=True):
        sizes = one.double().abs().T @ part.abs()
        assert_rounded_once(ours, one.double().T @ part, torch.float32, atol=(once + 1e-6) * (1 + sizes))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_they_are_what_autograd_makes_of_the_products(backend, dtype):
    x, a, _, grads = low_rank_inputs(33, 64, (8, 4), (32, 96), dtype)
    truth = [t.double().requires_grad_() for t in (x, a)]
    updates = [torch.randn(f, r, generator=torch.Generator().manual_seed(f)).to(dtype) for f, r in ((32, 8), (96, 4))]
    wide = [b.double().requires_grad_() for b in updates]
    low = truth[0] @ truth[1].T
    outputs = [part @ b.T for part, b in zip(low.split((8, 4), dim=1), wide, strict=True)]
    torch.autograd.backward(outputs, [grad.double() for grad in grads])
    low_grad = torch.cat([grad @ b for grad, b in zip(grads, updates, strict=True)], dim=1)
    grad = torch.cat((torch.zeros_like(x), low_grad), dim=1)
    _, *ours = _run(x, a, grad, grads, [8, 4], 1.0, backend)
    for mine, right in zip(ours, (*truth, *wide), strict=True):
        error = (mine.double() - right.grad).norm() / right.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("d", [64, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backend, dtype, d):
    x, a, grad, grads = low_rank_inputs(19, d, (4, 8), (d, d), dtype)
    results = []
    beside = NAN if backend == "cpp" else 7.0  # oneDNN multiplies what is beside an odd row of bfloat16 by zero
    for lay in (
        lambda t: t,
        strided,
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat((t, torch.full_like(t, beside)), dim=1)[:, : t.shape[1]],
    ):
        results.append(_run(*(lay(t) for t in (x, a, grad)), [lay(t) for t in grads], [4, 8], 1.0, backend))
    rows = ops.low_rank(x[:1].expand(19, d), a, backend=backend)  # a row that stands there once
    if backend == "cpp":  # torch's products may take another way
        assert all(bits_equal(results[0], others) for others in results[1:])
        assert bits_equal((rows,), (results[0][0][:1].expand_as(rows),))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("d", [64, 33])
def test_nothing_depends_on_threads_or_on_the_run(d):
    cases.need("cpp")
    inputs, results, threads = low_rank_inputs(300, d, (4, 17), (d, 65), torch.bfloat16), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(_run(*inputs, [4, 17], 1.0, "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(bits_equal(results[0], others) for others in results[1:])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("d", [64, 48])  # of an odd width oneDNN passes a NaN on to the row before
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_visible_in_their_own_rows(backend, dtype, d, bad):
    x, a, grad, (of_y,) = low_rank_inputs(37, d, (5,), (d,), dtype)
    x[35, 3] = grad[20, d + 2] = of_y[36, 7] = bad
    both, of_x, of_a, of_b = (t.isfinite() for t in _run(x, a, grad, [of_y], [5], 1.0, backend))
    assert not both[35, d:].any()
    assert both[35, :d].sum() == d - 1
    assert both[:35].all()
    assert both[36:].all()
    assert not of_x[20].any()
    assert of_x[torch.arange(37) != 20].all()
    # The gradients are sums over tokens: whatever takes in a bad number, and nothing else.
    good_a, good_b = torch.ones(5, d, dtype=torch.bool), torch.zeros(d, 5, dtype=torch.bool)
    good_a[2], good_a[:, 3] = False, False
    assert torch.equal(of_a, good_a)
    assert torch.equal(of_b, good_b)  # low is bad for every rank of token 35


def test_no_result_is_part_of_autograd_s_graph(backend):
    x, a, grad, grads = low_rank_inputs(3, 32, (4,), (32,))
    inputs = [t.requires_grad_() for t in (x, a, grad)]
    assert not any(t.requires_grad for t in _run(*inputs, grads, [4], 1.0, backend))


def test_compiles_as_one_graph(backend):
    def step(x, a, grad, grads):
        return _run(x * 2, a, grad, grads, [4, 0, 16], 0.5, backend)

    torch.compiler.reset()
    inputs = low_rank_inputs(6, 64, (4, 0, 16), (32, 64, 96), torch.bfloat16)
    for ours, eager in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager)


# --- arguments -------------------------------------------------------------------------------------------------------

BACK, X, A, BOTH = "low_rank_backward", torch.zeros(4, 6), torch.zeros(3, 6), torch.zeros(4, 9)
GRADS = [torch.zeros(4, 5), torch.zeros(4, 7)]
BAD_CALLS = {
    "1-d x": ("low_rank", (X[0], A), r"x: \(6,\) .* 2 dimensions"),
    "dtype of x": ("low_rank", (X.double(), A.double()), "x: .* float32, float16 or bfloat16"),
    "1-d a": ("low_rank", (X, A[0]), r"a: \(6,\) .* shape \(R, 6\)"),
    "shape of a": ("low_rank", (X, A[:, :5]), r"a: \(3, 5\) .* shape \(R, 6\)"),
    "dtype of a": ("low_rank", (X, A.half()), "a: .* dtype of x, torch.float32"),
    "1-d a backward": (BACK, (BOTH, BOTH, A[0], GRADS, [1, 2], 1.0), r"a: \(6,\) .* 2 dimensions"),
    "shape of both": (BACK, (BOTH, X, A, GRADS, [1, 2], 1.0), r"both: \(4, 6\) .* shape \(K, 9\)"),
    "dtype of both": (BACK, (BOTH, BOTH.double(), A, GRADS, [1, 2], 1.0), "both: .* float32, float16 or"),
    "shape of grad": (BACK, (X, BOTH, A, GRADS, [1, 2], 1.0), r"grad: \(4, 6\) .* shape of both, \(4, 9\)"),
    "dtype of grad": (BACK, (BOTH.half(), BOTH, A, GRADS, [1, 2], 1.0), "grad: .* dtype of both"),
    "dtype of a backward": (BACK, (BOTH, BOTH, A.half(), GRADS, [1, 2], 1.0), "a: .* dtype of both"),
    "number of ranks": (BACK, (BOTH, BOTH, A, GRADS, [3], 1.0), "ranks: 1 of them; .* each of 2 grads"),
    "sum of ranks": (BACK, (BOTH, BOTH, A, GRADS, [1, 1], 1.0), r"ranks: \[1, 1\]; .* and 3 in all"),
    "negative rank": (BACK, (BOTH, BOTH, A, GRADS, [4, -1], 1.0), r"ranks: \[4, -1\]; must be 0 or more"),
    "shape of grads": (BACK, (BOTH, BOTH, A, [X, X[:3]], [1, 2], 1.0), r"grads\[1\]: \(3, 6\) .* \(4, F\)"),
    "dtype of grads": (BACK, (BOTH, BOTH, A, [X, X.half()], [1, 2], 1.0), r"grads\[1\]: .* dtype of both"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named(backend, name):
    op, args, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, backend=backend)


# --- tiles -----------------------------------------------------------------------------------------------------------


def _at_the_end_of_memory(t):
    """A copy after which memory ends: whoever reads on ends the process."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    mapped = -(-size // page) * page
    room = mmap.mmap(-1, mapped + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(room)) + mapped
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(room, dtype=t.dtype, count=t.numel(), offset=mapped - size).view(t.shape).copy_(t)


# A tile is read whole, 16 rows of 64 bytes.
@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_beyond_the_inputs_is_read():
    cases.need("cpp")
    for k, d, ranks, outputs in (
        (1, 32, (1,), (32,)),
        (17, 64, (17,), (96,)),
        (33, 32, (5, 3), (32, 64)),
        (5, 33, (4,), (31,)),
    ):
        x, a, grad, grads = low_rank_inputs(k, d, ranks, outputs, torch.bfloat16)
        plain = _run(x, a, grad, grads, ranks, backend="cpp")
        x, a, grad, both, *grads = (_at_the_end_of_memory(t) for t in (x, a, grad, plain[0], *grads))
        of_x, of_a, of_b = ops.low_rank_backward(grad, both, a, grads, ranks, 1.0, backend="cpp")
        assert bits_equal(plain, (ops.low_rank(x, a, backend="cpp"), of_x, of_a, *of_b))
    for shape in (
        (1, 1, 1, 1, 1, 32),
        (1, 2, 3, 5, 33, 64),
        (2, 1, 1, 17, 31, 32),
        (1, 1, 2, 33, 70, 96),
        (1, 1, 1, 5, 7, 9),
    ):
        inputs, grad = attention_inputs(*shape, torch.bfloat16)
        plain = ops.attention(*inputs, backend="cpp")
        inputs, grad, weights = (
            [_at_the_end_of_memory(t) for t in inputs],
            *map(_at_the_end_of_memory, (grad, plain[1])),
        )
        assert bits_equal(plain, ops.attention(*inputs, backend="cpp"))
        ops.attention_backward(grad, *inputs, weights, backend="cpp")


def test_beside_onednn_s_products():
    """oneDNN sets tiles up in its own way and takes them to stay so in its thread: both, by turns, in four threads."""
    cases.need("cpp")
    factors = [
        torch.randn(m, n, generator=torch.Generator().manual_seed(m)).bfloat16() for m, n in ((50, 96), (96, 72))
    ]
    product = factors[0].double() @ factors[1].double()
    low = low_rank_inputs(40, 64, (4, 17), (32, 96), torch.bfloat16)
    inputs, grad = attention_inputs(2, 1, 2, 9, 40, 64, torch.bfloat16)

    def ours():
        attended, weights = ops.attention(*inputs, backend="cpp")
        gradients = ops.attention_backward(grad, *inputs, weights, backend="cpp")
        return *_run(*low, [4, 17], backend="cpp"), attended, weights, *gradients

    expected, failed = ours(), []

    def work():
        try:
            for i in range(12):
                for rows in (50, 17 + i):  # a size that comes again, and new ones
                    assert_rounded_once(factors[0][:rows] @ factors[1], product[:rows], torch.bfloat16, atol=1e-4)
                assert bits_equal(expected, ours())
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
