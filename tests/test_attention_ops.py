"""The operators of attention, ``rotate_rows``, ``masked_softmax_`` and ``softmax_backward_``: against float64, odd and
empty shapes, every dtype, any strides, special values. What all of a layer's operators must do is in
``test_layer_ops.py``.

Shape legend: K tokens, H heads, E head size, P rows of one head, B sequences, Q queries, S keys.
"""

import op_cases as cases
import pytest
import torch
from layer_op_cases import DTYPES, INF, NAN, assert_rounded_once, bits_equal, head_rows, randn, scores_and_mask, strided

from cascade_fast import ops


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return cases.need(request.param)


# --- rotate_rows -----------------------------------------------------------------------------------------------------

# (K, H, E, P): no token, no number, one of each, all rows covered, sizes of halves above and below vectors.
PLACES = ((0, 2, 8, 5), (0, 2, 8, 0), (3, 2, 0, 7), (1, 1, 2, 1), (5, 3, 6, 40), (33, 2, 18, 66), (7, 1, 66, 9))


def _placed(x, cos, sin, index, into):
    k = len(index) // x.shape[1]
    first, second = x[:k].chunk(2, dim=-1)
    if cos.numel():
        c, s = cos[:, None], sin[:, None]
        first, second = first * c - second * s, second * c + first * s
    return into.index_copy(0, index, torch.cat((first, second), dim=-1).flatten(0, 1))


@pytest.mark.parametrize("turned", [True, False], ids=["turned", "as it is"])
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PLACES, ids=str)
def test_rotated_and_placed(backend, shape, dtype, beyond, turned):
    x, cos, sin, index, into = head_rows(*shape, dtype, beyond)
    if not turned:
        cos = sin = torch.empty(0)
    kept = into.clone()
    x[shape[0] :] = NAN  # stands nowhere
    truth = x.double().requires_grad_()
    expected = _placed(truth, cos.double(), sin.double(), index, into.double())
    grad = randn(*into.shape, dtype=dtype, seed=4)
    expected.backward(grad.double())
    ours = x.clone().requires_grad_()
    out = ops.rotate_rows(ours, cos, sin, index, into, backend=backend)
    out.backward(grad)
    assert out.is_contiguous()
    assert_rounded_once(out, expected, dtype)
    assert_rounded_once(ours.grad, truth.grad, dtype)
    assert torch.equal(ours.grad[shape[0] :], torch.zeros_like(x[shape[0] :]))
    assert torch.equal(into, kept)
    if not turned:
        assert torch.equal(out[index], x[: shape[0]].flatten(0, 1))


def test_rows_placed_from_any_strides(backend):
    x, cos, sin, index, into = head_rows(7, 2, 10, 20, torch.bfloat16)
    grad = randn(20, 10, dtype=torch.bfloat16, seed=4)
    results = []
    for lay in (lambda t: t, strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        ours = lay(x).detach().requires_grad_()
        out = ops.rotate_rows(ours, lay(cos), lay(sin), lay(index), lay(into), backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, ours, lay(grad))])
    assert bits_equal(results[0], results[1])
    assert bits_equal(results[0], results[2])


def test_rows_placed_among_zeros_that_are_one_row_in_memory(backend):
    x, cos, sin, index, _ = head_rows(3, 2, 10, 20)
    room = torch.zeros(1, 10).expand(20, 10)
    out = ops.rotate_rows(x, cos, sin, index, room, backend=backend)
    torch.testing.assert_close(out, _placed(x, cos, sin, index, torch.zeros(20, 10)))
    assert torch.equal(room, torch.zeros(20, 10))


def test_what_is_covered_is_not_read(backend):
    x, cos, sin, index, into = head_rows(10, 2, 10, 20)
    out = ops.rotate_rows(x, cos, sin, index, torch.full_like(into, NAN), backend=backend)
    torch.testing.assert_close(out, _placed(x, cos, sin, index, into))


def test_rotating_by_nothing_and_by_a_quarter_turn(backend):
    x = randn(1, 1, 6)
    cos, sin, index = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0])
    out = ops.rotate_rows(x, cos, sin, index, torch.zeros(1, 6), backend=backend)
    a, b, c, d, e, f = x.flatten().tolist()
    assert out.tolist() == [[a, -e, -c, d, b, -f]]


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_index_out_of_range_is_an_error(backend, bad):
    x, cos, sin, index, into = head_rows(3, 2, 10, 20)
    index[4] = bad
    message = rf"index: entry 4 is {bad}; must be in \[0, 20\)" if backend == "cpp" else None
    with pytest.raises(IndexError, match=message):
        ops.rotate_rows(x, cos, sin, index, into, backend=backend)


# --- masked_softmax_, softmax_backward_ ------------------------------------------------------------------------------

SCORES = ((0, 2, 3, 4), (2, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 1, 31),
          (1, 2, 3, 32), (2, 2, 3, 33), (2, 4, 50, 65))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_masked_softmax(backend, shape, dtype):
    scores, mask = scores_and_mask(*shape, dtype)
    truth = (scores.double() + mask.double()).softmax(-1)
    kept = mask.clone()
    ops.masked_softmax_(scores, mask, backend=backend)
    assert_rounded_once(scores, truth, dtype, atol=1e-7)
    assert torch.equal(scores == 0, truth.to(dtype) == 0)  # what is hidden has no weight at all
    assert torch.equal(mask, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SCORES, (7,), (0,), (3, 33)], ids=str)
def test_softmax_backward(backend, shape, dtype):
    grad, weights = randn(*shape, dtype=dtype), randn(*shape, seed=1).mul(2).softmax(-1).to(dtype)
    g, w = grad.double(), weights.double()
    truth, kept = w * (g - (g * w).sum(-1, keepdim=True)), weights.clone()
    ops.softmax_backward_(grad, weights, backend=backend)
    assert_rounded_once(grad, truth, dtype)
    assert torch.equal(weights, kept)


def test_softmax_backward_is_the_gradient_of_masked_softmax(backend):
    scores, mask = scores_and_mask(2, 3, 5, 33)
    truth, grad = scores.double().requires_grad_(), randn(*scores.shape, seed=5)
    (truth + mask.double()).softmax(-1).backward(grad.double())
    ops.masked_softmax_(scores, mask, backend=backend)
    ops.softmax_backward_(grad, scores, backend=backend)
    assert_rounded_once(grad, truth.grad, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [3, 40])
def test_one_visible_key_has_all_the_weight(backend, s, dtype):
    scores, mask = randn(1, 2, s, s, dtype=dtype) * 1000, torch.full((1, 1, s, s), -INF, dtype=dtype)
    mask[0, 0].fill_diagonal_(0.0)
    ops.masked_softmax_(scores, mask, backend=backend)
    assert torch.equal(scores, torch.eye(s, dtype=dtype).expand(1, 2, s, s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [4, 40])
def test_large_scores_do_not_overflow(backend, s, dtype):
    most = torch.finfo(dtype).max
    scores = torch.full((1, 1, 3, s), -most, dtype=dtype)
    scores[0, 0, :, :2] = torch.tensor([[most, most], [most, -most], [-1e4, -1e4]]).to(dtype)
    mask = torch.zeros_like(scores)
    ops.masked_softmax_(scores, mask, backend=backend)
    expected = torch.zeros(3, s)
    expected[:, :2] = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    assert torch.equal(scores[0, 0], expected.to(dtype))
    # All alike, however large: equal weights. A mask's most negative number does not overflow either.
    scores, mask = torch.full((1, 1, 1, s), 1e4, dtype=dtype), torch.full((1, 1, 1, s), -most, dtype=dtype)
    ops.masked_softmax_(scores, mask, backend=backend)
    assert_rounded_once(scores, torch.full((1, 1, 1, s), 1 / s, dtype=torch.double), dtype)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_visible_in_their_own_row(backend, dtype, at, bad):
    scores, mask = randn(1, 1, 3, 40, dtype=dtype), torch.zeros(1, 1, 3, 40, dtype=dtype)
    scores[0, 0, 1, at] = bad
    ops.masked_softmax_(scores, mask, backend=backend)
    assert scores[0, 0, 1].isnan().any()
    assert scores[0, 0, ::2].isfinite().all()
    grad = randn(1, 1, 3, 40, dtype=dtype, seed=1)
    ops.softmax_backward_(grad, scores, backend=backend)
    assert grad[0, 0, 1].isnan().any()
    assert grad[0, 0, ::2].isfinite().all()
