"""The operators of a decoder layer (``cascade_fast/ops/layers.py``): outputs and gradients against float64, odd and
empty shapes, every dtype, any strides, special values. What every operator of a layer must do is tested for those with
files of their own, too: ``test_attention_ops.py``, ``test_low_rank_op.py``.

Shape legend: N tokens, D hidden size, F intermediate size, K tokens, H heads, E head size, P rows of one head.
"""

import copy

import op_cases as cases
import pytest
import torch
from layer_op_cases import (
    DTYPES,
    EPS,
    INF,
    NAN,
    assert_rounded_once,
    bits_equal,
    calls,
    head_rows,
    norm_inputs,
    randn,
    strided,
)
from torch.nn import functional as F

from cascade_fast import ops

NATIVE = torch.ops.cascade_fast
# Empty either way, one element, below / at / above what a body takes at once, several blocks.
MATRICES = ((0, 8), (3, 0), (1, 1), (3, 7), (1, 31), (5, 32), (33, 33), (67, 577))


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return cases.need(request.param)


# --- add_rms_norm ----------------------------------------------------------------------------------------------------


def _sum_and_norm(x, added, weight):
    total = x + added
    return total, F.rms_norm(total, total.shape[-1:], weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), MATRICES)
def test_sum_and_norm(backend, n, d, dtype):
    x, added, weight, grads = norm_inputs(n, d, dtype)
    truth = [t.double().requires_grad_() for t in (x, added, weight)]
    expected = _sum_and_norm(*truth)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    ours = [t.clone().requires_grad_() for t in (x, added, weight)]
    total, normed = ops.add_rms_norm(*ours, EPS, backend=backend)
    torch.autograd.backward((total, normed), grads)
    assert torch.equal(total, x + added)
    assert_rounded_once(normed, expected[1], dtype)
    assert_rounded_once(ours[0].grad, truth[0].grad, torch.float32, atol=1e-5)
    assert_rounded_once(ours[1].grad, truth[1].grad, dtype, atol=1e-5)
    assert_rounded_once(ours[2].grad, truth[2].grad, torch.float32, atol=1e-5 * max(1, n) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), MATRICES)
def test_sum_and_norm_have_the_bits_of_a_sum_and_a_norm(n, d, dtype):
    """On the CPU: what a stage whose norms learn trains to does not depend on which of them it calls."""
    x, added, weight, grads = norm_inputs(n, d, dtype)
    results = []
    for fused in (True, False):
        ours = [t.clone().requires_grad_() for t in (x, added, weight)]
        total = ours[0] + ours[1]
        out = (total, ops.rms_norm(total, ours[2], EPS, dtype=dtype))
        if fused:
            out = ops.add_rms_norm(*ours, EPS)
        torch.autograd.backward(out, grads)
        results.append([*(t.detach() for t in out), *(t.grad for t in ours)])
    assert bits_equal(*results)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (True, True, True)])
def test_sum_and_norm_with_one_output_used_or_one_gradient_wanted(backend, used, wanted):
    x, added, weight, grads = norm_inputs(9, 33, torch.float32)
    inputs = x, added, weight
    ours, truth = ([t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)] for _ in range(2))
    ops.add_rms_norm(*ours, EPS, backend=backend)[used].backward(grads[used])
    _sum_and_norm(*truth)[used].backward(grads[used])
    for one, other in zip(ours, truth, strict=True):
        if other.requires_grad and other.grad is None:  # a weight, where the sum alone is used
            other.grad = torch.zeros_like(other)
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    if all(wanted):
        assert ours[0].grad.data_ptr() != ours[1].grad.data_ptr()


def test_sum_and_norm_of_any_strides(backend):
    x, added, weight, grads = norm_inputs(9, 34, torch.bfloat16)
    results = []
    for lay in (lambda t: t, strided, lambda t: t.T.contiguous().T):
        ours = [lay(t).detach().requires_grad_() for t in (x, added)]
        out = ops.add_rms_norm(*ours, strided(weight), EPS, backend=backend)
        torch.autograd.backward(out, [lay(grad) for grad in grads])
        results.append([t.detach() for t in (*out, *(t.grad for t in ours))])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other)


def test_sum_and_norm_of_zeros_and_nan(backend):
    x, added, weight, _ = norm_inputs(3, 20, torch.bfloat16)
    x[0], added[0], added[1, 7] = 0.0, 0.0, NAN
    total, normed = ops.add_rms_norm(x, added, weight, EPS, backend=backend)
    assert torch.equal(normed[0], torch.zeros_like(normed[0]))
    assert normed[1].isnan().all()
    assert total[1].isnan().sum() == 1
    assert normed[2].isfinite().all()


# --- scale_into_ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_into_parts_of_other_matrices(backend, dtype):
    shapes = [*MATRICES, (1, 5), (16, 16)]
    values = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    rooms = [torch.full((n + 2, d + 3), 7.0, dtype=dtype) for n, d in shapes]
    into = [room[1 : 1 + n, 2 : 2 + d] for room, (n, d) in zip(rooms, shapes, strict=True)]
    ops.scale_into_(into, values, 0.3, backend=backend)
    for room, out, value in zip(rooms, into, values, strict=True):
        assert_rounded_once(out, value.double() * 0.3, dtype, atol=1e-7)
        out.fill_(7.0)
        assert (room == 7.0).all()  # nothing beside its place is touched


def test_nothing_to_scale(backend):
    ops.scale_into_([], [], 2.0, backend=backend)


def test_scaling_keeps_special_values(backend):
    values = torch.tensor([[INF, -INF, NAN, 0.0, -0.0, 3e38, 1e-45]])
    into = torch.zeros(1, 7, dtype=torch.float16)
    ops.scale_into_([into], [values], 2.0, backend=backend)
    torch.testing.assert_close(into, (values * 2).half(), rtol=0, atol=0, equal_nan=True)


# --- silu_mul --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "f"), MATRICES)
def test_gated_product(backend, n, f, dtype):
    gate, up, grad = (randn(n, f, seed=i).mul(4).to(dtype) for i in range(3))
    truth = [t.double().requires_grad_() for t in (gate, up)]
    expected = F.silu(truth[0]) * truth[1]
    expected.backward(grad.double())
    ours = [t.clone().requires_grad_() for t in (gate, up)]
    out = ops.silu_mul(*ours, backend=backend)
    out.backward(grad)
    assert_rounded_once(out, expected, dtype)
    for one, other in zip(ours, truth, strict=True):
        assert_rounded_once(one.grad, other.grad, dtype, atol=2e-5)  # terms of several hundred cancel


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gated_product_with_one_gradient_wanted(backend, wanted):
    ours = [randn(3, 5, seed=i).requires_grad_(w) for i, w in enumerate(wanted)]
    ops.silu_mul(*ours, backend=backend).sum().backward()
    assert [t.grad is not None for t in ours] == list(wanted)


def test_gated_product_of_any_strides(backend):
    gate, up, grad = (randn(9, 34, seed=i) for i in range(3))
    results = []
    for lay in (lambda t: t, strided, lambda t: t.T.contiguous().T, lambda t: t.clone()[:1].expand(9, 34)):
        ours = [lay(t).detach().requires_grad_() for t in (gate, up)]
        out = ops.silu_mul(*ours, backend=backend)
        results.append([out, *torch.autograd.grad(out, ours, lay(grad))])
    for one, *others, expanded in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, one)
        torch.testing.assert_close(expanded, one[:1].expand(9, 34))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [9, 40])  # a rest, or whole vectors and a rest
def test_gates_far_from_zero(backend, dtype, width):
    gate = torch.zeros(1, width, dtype=dtype)
    gate[0, :9] = torch.tensor([1e4, -1e4, 100.0, -100.0, 87.5, -87.5, INF, NAN, -0.0])
    gate.requires_grad_()
    up = torch.ones(1, width, dtype=dtype, requires_grad=True)
    out = ops.silu_mul(gate, up, backend=backend)
    grad_gate, grad_up = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    truth = gate.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(truth), truth, torch.ones_like(truth))
    assert out[0, 7].isnan()
    assert grad_gate[0, 7].isnan()
    assert out[0, 6] == INF
    wanted[0, 6] = grad_gate[0, 6].double()  # torch has NaN at infinity
    for ours, right in ((out, F.silu(truth)), (grad_up, F.silu(truth)), (grad_gate, wanted)):
        torch.testing.assert_close(ours, right.to(dtype).detach(), equal_nan=True, rtol=1e-5, atol=1e-7)


# --- every operator --------------------------------------------------------------------------------------------------


OPS = tuple(calls(2))
TRAINED = {"add_rms_norm": (0, 1, 2), "silu_mul": (0, 1), "rotate_rows": (0,)}


def test_no_operator_is_left_out():
    have_their_own_files = {"cross_entropy_", "rms_norm", "rms_norm_backward", "adamw8bit"}
    have_their_own_files |= {*ops.SELECTION_OPS, *ops.GPU_OPS}
    assert set(OPS) == set(ops.OPS) - have_their_own_files


@pytest.mark.parametrize("op", OPS)
def test_runs_and_thread_counts_agree_bit_for_bit(backend, op):
    args, results, threads = calls(1200, torch.bfloat16)[op], [], torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            own = copy.deepcopy(args)  # some operators change theirs
            results.append(cases.flat((getattr(NATIVE, op)(*own, backend=backend), own)))
    finally:
        torch.set_num_threads(threads)
    assert bits_equal(results[0], results[2])
    if backend == "cpp":  # torch's own sums may depend on the number of threads
        assert bits_equal(results[0], results[1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(backend, op, dtype):
    args = list(calls(5, dtype)[op])
    for i in TRAINED.get(op, ()):
        args[i] = args[i].clone().requires_grad_()
    torch.library.opcheck(getattr(NATIVE, op).default, tuple(args), {"backend": backend})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(backend, dynamic):
    x, added, weight, _ = norm_inputs(6, 24, torch.float32)
    _, cos, sin, index, into = head_rows(5, 4, 6, 30)

    def layer(x, added):
        total, normed = ops.add_rms_norm(x * 2, added, weight, EPS, backend=backend)
        gated = ops.silu_mul(normed, added, backend=backend)
        placed = ops.rotate_rows(gated.view(-1, 4, 6), cos, sin, index, into, backend=backend)
        return total, placed.sin()

    torch.compiler.reset()
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        ours = [t.clone().requires_grad_() for t in (x, added)]
        out = run(*ours)
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])
        results.append([*out, *(t.grad for t in ours)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_an_operator_in_place_compiles_as_one_graph(backend):
    def step(value):
        out = torch.zeros(2, 5, 3)
        ops.scale_into_([out[0], out[1, 1:]], [value, value[1:] * 3], 0.5, backend=backend)
        return out

    torch.compiler.reset()
    value = randn(5, 3)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(value), step(value))


M, ANGLES, INDEX = torch.zeros(4, 6), torch.zeros(2, 3), torch.tensor([0, 2, 3, 1])
HEADS = torch.zeros(2, 2, 6)
BAD_CALLS = {
    "1-d x": ("add_rms_norm", (M[0], M[0], M[0], EPS), r"x: \(6,\) .* 2 dimensions"),
    "dtype of x": ("add_rms_norm", (M.half(), M.half(), M[0], EPS), "x: .* must be float32"),
    "shape of added": ("add_rms_norm", (M, M[:3], M[0], EPS), r"added: \(3, 6\) .* shape of x, \(4, 6\)"),
    "dtype of added": ("add_rms_norm", (M, M.double(), M[0], EPS), "torch.float64; must be float32, float16 or bf"),
    "shape of weight": ("add_rms_norm", (M, M, M[0, :5], EPS), r"weight: \(5,\) .* shape \(6,\)"),
    "dtype of weight": ("add_rms_norm", (M, M, M[0].half(), EPS), "weight: .* must be float32"),
    "number of values": ("scale_into_", ([M], [], 1.0), "values: 0 of them; must be one for each of 1 into"),
    "1-d into": ("scale_into_", ([M, M[0]], [M, M[0]], 1.0), r"into\[1\]: \(6,\) .* contiguous rows"),
    "columns of into": ("scale_into_", ([M.T], [M.T.contiguous()], 1.0), r"into\[0\]: \(6, 4\) .* contiguous rows"),
    "dtype of into": ("scale_into_", ([M.double()], [M], 1.0), r"into\[0\]: .* float32, float16 or bfloat16"),
    "dtypes of into": ("scale_into_", ([M, M.half()], [M, M], 1.0), r"into\[1\]: .* dtype of into\[0\]"),
    "shape of values": ("scale_into_", ([M], [M[:3]], 1.0), r"values\[0\]: \(3, 6\) .* shape \(4, 6\)"),
    "dtype of values": ("scale_into_", ([M], [M.half()], 1.0), r"values\[0\]: .* contiguous float32"),
    "strides of values": ("scale_into_", ([M], [strided(M)], 1.0), r"values\[0\]: .* contiguous float32"),
    "1-d gate": ("silu_mul", (M[0], M[0]), r"gate: \(6,\) .* 2 dimensions"),
    "dtype of gate": ("silu_mul", (M.double(), M.double()), "gate: .* float32, float16 or bfloat16"),
    "shape of up": ("silu_mul", (M, M[:3]), r"up: \(3, 6\) .* shape of gate, \(4, 6\)"),
    "dtype of up": ("silu_mul", (M, M.half()), "up: .* dtype of gate, torch.float32"),
    "2-d heads": ("rotate_rows", (M, ANGLES, ANGLES, INDEX, M), r"x: \(4, 6\) .* 3 dimensions"),
    "dtype of heads": ("rotate_rows", (HEADS.double(), ANGLES, ANGLES, INDEX, M), "x: .* float32, float16 or bf"),
    "no head": ("rotate_rows", (HEADS[:, :0], ANGLES[:0], ANGLES[:0], INDEX[:0], M), r"x: \(2, 0, 6\) .* one head"),
    "odd heads": ("rotate_rows", (HEADS[..., :5], ANGLES, ANGLES, INDEX, M[:, :5]), "x: .* even size"),
    "dtype of index": ("rotate_rows", (HEADS, ANGLES, ANGLES, INDEX.int(), M), "index: .* int64"),
    "half a token": ("rotate_rows", (HEADS, ANGLES, ANGLES, INDEX[:3], M), r"index: \(3,\) .* 2 entries"),
    "too many in index": ("rotate_rows", (HEADS[:1], ANGLES, ANGLES, INDEX, M), r"index: \(4,\) .* at most 1 tokens"),
    "2-d index": ("rotate_rows", (HEADS, ANGLES, ANGLES, INDEX[None], M), r"index: \(1, 4\)"),
    "width of rows": ("rotate_rows", (HEADS, ANGLES, ANGLES, INDEX, M[:, :4]), r"into: \(4, 4\) .* shape \(P, 6\)"),
    "dtype of rows": ("rotate_rows", (HEADS, ANGLES, ANGLES, INDEX, M.half()), "into: .* dtype of x, torch.float32"),
    "shape of cos": ("rotate_rows", (HEADS, ANGLES[:1], ANGLES, INDEX, M), r"cos: \(1, 3\) .* shape \(2, 3\)"),
    "shape of sin": ("rotate_rows", (HEADS, ANGLES, ANGLES[:, :2], INDEX, M), r"sin: \(2, 2\) .* shape \(2, 3\)"),
    "sin alone": ("rotate_rows", (HEADS, ANGLES[:0], ANGLES, INDEX, M), r"sin: \(2, 3\) .* shape of cos, \(0, 3\)"),
    "dtype of sin": ("rotate_rows", (HEADS, ANGLES, ANGLES.half(), INDEX, M), "sin: .* float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named(backend, name):
    op, args, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error(op):
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run {op}: it serves CUDA tensors"):
        getattr(NATIVE, op)(*calls(4)[op], backend="cuda")
