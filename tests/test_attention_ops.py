"""The operators of attention, ``rotate_rows``, ``attention`` and ``attention_backward``: against float64, odd and empty
shapes, every dtype, any strides, special values. What all of a layer's operators must do is in ``test_layer_ops.py``,
and what reads tiles in ``test_low_rank_op.py``. In bfloat16 heads of 32, 64, 96 go by tiles on a processor with AMX,
others by torch's products on every processor.

Shape legend: K tokens, H heads, E head size, P rows of one head, B sequences, G key heads, N = B * G, Q queries of a
head, R = (H / G) * Q, S keys.
"""

import op_cases as cases
import pytest
import torch
from layer_op_cases import (
    DTYPES,
    INF,
    NAN,
    assert_rounded_once,
    attention_inputs,
    bits_equal,
    head_rows,
    randn,
    strided,
)

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


# --- attention -------------------------------------------------------------------------------------------------------

# (B, G, H / G, Q, S, E): empty in each dimension, one of each, around 16 and 32, heads of other sizes than tiles'.
ATTENDED = (
    (0, 2, 2, 3, 4, 32), (1, 0, 2, 3, 4, 32), (1, 2, 0, 3, 4, 32), (2, 1, 2, 0, 5, 32), (2, 1, 3, 5, 0, 32),
    (2, 1, 3, 5, 0, 8), (1, 2, 2, 3, 4, 0), (1, 1, 1, 1, 1, 32), (1, 1, 1, 1, 1, 1), (2, 2, 3, 5, 5, 64),
    (1, 2, 2, 16, 16, 32), (2, 1, 3, 17, 17, 48), (1, 1, 2, 31, 33, 96), (2, 1, 3, 32, 32, 64), (1, 2, 1, 33, 70, 32),
    (1, 1, 3, 70, 70, 64), (1, 1, 2, 5, 70, 48), (1, 1, 1, 16, 31, 96), (3, 1, 1, 1, 70, 64), (1, 1, 9, 1, 32, 64),
)  # fmt: skip
MASKS = ("causal", "rows", "gaps", "numbers")


def _of_all_heads(mask_B1QS, groups, times):
    """``(N, R, S)``: what is added to the scores of all heads."""
    return mask_B1QS[:, 0].repeat(1, times, 1).repeat_interleave(groups, dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_and_its_gradients(backend, shape, dtype):
    keys, eps = shape[4], torch.finfo(dtype).eps
    for kind in MASKS:
        inputs, grad = attention_inputs(*shape, dtype, kind)
        kept = [t.clone() for t in (*inputs, grad)]
        attended, weights = ops.attention(*inputs, backend=backend)
        gradients = ops.attention_backward(grad, *inputs, weights, backend=backend)
        assert bits_equal((*inputs, grad), kept)
        q, k, v, mask = (t.double() for t in inputs)
        g, mask = grad.double(), _of_all_heads(mask, *shape[1:3])
        scores = q @ k.mT
        truth = (scores + mask).softmax(-1)
        # Scores may have been rounded, by up to half a unit of their sizes.
        largest = scores.abs().amax() if scores.numel() else 0.0
        assert weights.shape == (*q.shape[:2], -(-keys // 32) * 32)
        assert not weights[..., keys:].any()
        w = weights[..., :keys].double()
        assert ((w - truth).abs() <= truth * (1 + 2 * largest) * eps + 1e-6).all()
        assert not w[truth == 0].any()  # what is hidden has no weight at all
        # From here on of the weights as they were rounded.
        assert_rounded_once(attended, w @ v, dtype, atol=1e-6 * (1 + w @ v.abs()))
        g_w = g @ v.mT
        g_scores = w * (g_w - (g_w * w).sum(-1, keepdim=True))
        # Two roundings at most of a weight's gradient and the score's, and float32's of their sums.
        unsure = eps * g_w.abs() + 1e-6 * (g.abs() @ v.abs().mT)
        unsure = w * (unsure + (unsure * w).sum(-1, keepdim=True))
        for ours, right, size in (
            (gradients[0], g_scores @ k, unsure @ k.abs()),
            (gradients[1], g_scores.mT @ q, unsure.mT @ q.abs()),
            (gradients[2], w.mT @ g, 1e-6 * w.mT @ g.abs()),
        ):
            assert_rounded_once(ours, right, dtype, atol=1.5 * size + 1e-6)


@pytest.mark.parametrize("e", [64, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_what_autograd_differentiates(backend, dtype, e):
    inputs, grad = attention_inputs(2, 2, 3, 9, 40, e, dtype, "rows")
    truth = [t.double().requires_grad_() for t in inputs[:3]]
    weights = (truth[0] @ truth[1].mT + _of_all_heads(inputs[3].double(), 2, 3)).softmax(-1)
    (weights @ truth[2]).backward(grad.double())
    ours = ops.attention_backward(grad, *inputs, ops.attention(*inputs, backend=backend)[1], backend=backend)
    for mine, right in zip(ours, truth, strict=True):
        assert (mine.double() - right.grad).norm() < 4 * torch.finfo(dtype).eps * right.grad.norm()


@pytest.mark.parametrize("e", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [3, 40])
def test_one_visible_key_has_all_the_weight(backend, s, dtype, e):
    (query, key, value, mask), _ = attention_inputs(1, 1, 2, s, s, e, dtype)
    mask = torch.full_like(mask, -INF)
    mask[0, 0].fill_diagonal_(0.0)
    attended, weights = ops.attention(query * 100, key, value, mask, backend=backend)
    assert torch.equal(weights[0, :, :s], torch.eye(s, dtype=dtype).repeat(2, 1))
    assert torch.equal(attended[0], value[0].repeat(2, 1))


@pytest.mark.parametrize("e", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [4, 40])
def test_large_scores_do_not_overflow(backend, s, dtype, e):
    most, large = torch.finfo(dtype).max, 2.0 ** (14 if dtype == torch.float16 else 126)
    (query, key, value, mask), _ = attention_inputs(1, 1, 1, 4, s, e, dtype)
    key.zero_()[0, :2, 0] = torch.tensor([1.0, -1.0])
    query.zero_()[0, :, 0] = torch.tensor([large, -large, 100.0, 0.0])
    mask.fill_(-INF)[..., :2] = 0.0
    mask[0, 0, 3] = -most  # a mask's most negative number does not overflow either: all alike, equal weights
    weights = ops.attention(query, key, value, mask, backend=backend)[1]
    assert weights[0, :3, :2].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert not weights[0, :3, 2:].any()
    assert_rounded_once(weights[0, 3, :s], torch.full((s,), 1 / s, dtype=torch.double), dtype)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("e", [32, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_visible_and_in_their_own_rows(backend, dtype, e, bad):
    (query, key, value, mask), grad = attention_inputs(2, 2, 2, 9, 40, e, dtype)
    query[1, 11, 3] = value[2, 38, 5] = grad[3, 7, 1] = bad
    attended, weights = ops.attention(query, key, value, mask, backend=backend)
    assert not weights[1, 11, :34].isfinite().any()  # all that it sees
    assert not weights[..., 40:].any()
    assert not attended[1, 11].isfinite().any()
    assert not attended[2, [7, 8, 16, 17], 5].isfinite().any()  # the queries that see key 38; others may be NaN, too
    weights[1, 11], attended[1, 11], attended[2, :, 5] = 0.0, 0.0, 0.0
    assert weights.isfinite().all()
    assert attended.isfinite().all()
    query[1, 11, 3] = value[2, 38, 5] = 0.0
    gradients = ops.attention_backward(grad, query, key, value, mask, weights, backend=backend)
    for gradient in gradients:
        assert not gradient[3].isfinite().all()
        assert gradient[:3].isfinite().all()
    assert not gradients[0][3, 7].isfinite().any()
    assert gradients[0][3, torch.arange(18) != 7].isfinite().all()


@pytest.mark.parametrize("e", [32, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_any_strides(backend, dtype, e):
    inputs, grad = attention_inputs(2, 2, 2, 5, 40, e, dtype, "numbers")
    results = []
    for lay in (lambda t: t, strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        laid = [lay(t) for t in inputs]
        attended, weights = ops.attention(*laid, backend=backend)
        results.append((attended, weights, *ops.attention_backward(lay(grad), *laid, lay(weights), backend=backend)))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other)
    key = inputs[1][:1, :1].expand(4, 40, e)  # one row in memory: every key alike
    weights = ops.attention(inputs[0], key, inputs[2], inputs[3] * 0, backend=backend)[1]
    assert weights[..., :40].isnan().any()  # -inf * 0 is no mask
    weights = ops.attention(inputs[0], key, inputs[2], torch.zeros_like(inputs[3]), backend=backend)[1]
    assert_rounded_once(weights[..., :40], torch.full((4, 10, 40), 1 / 40, dtype=torch.double), dtype)


def test_attention_leaves_no_graph(backend):
    inputs, grad = attention_inputs(1, 1, 1, 2, 3, 4)
    results = ops.attention(*(t.requires_grad_() for t in inputs), backend=backend)
    gradients = ops.attention_backward(grad, *inputs, results[1], backend=backend)
    assert not any(t.requires_grad for t in (*results, *gradients))


def test_attention_compiles_as_one_graph(backend):
    def step(query, grad, *others):
        attended, weights = ops.attention(query * 2, *others, backend=backend)
        return attended, weights, *ops.attention_backward(grad, query, *others, weights, backend=backend)

    torch.compiler.reset()
    (query, *others), grad = attention_inputs(2, 2, 2, 5, 33, 32, torch.bfloat16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(query, grad, *others)
    for ours, eager in zip(compiled, step(query, grad, *others), strict=True):
        torch.testing.assert_close(ours, eager)


Q, K, M, W = torch.zeros(4, 6, 8), torch.zeros(4, 5, 8), torch.zeros(2, 1, 3, 5), torch.zeros(4, 6, 32)
BACK = "attention_backward"
BAD_CALLS = {
    "2-d query": ("attention", (Q[0], K, K, M), r"query: \(6, 8\) .* 3 dimensions"),
    "dtype of query": ("attention", (Q.double(), K, K, M), "query: .* float32, float16 or bfloat16"),
    "2-d key": ("attention", (Q, K[0], K, M), r"key: \(5, 8\) .* shape \(4, S, 8\)"),
    "heads of key": ("attention", (Q, K[:3], K, M), r"key: \(3, 5, 8\) .* shape \(4, S, 8\)"),
    "keys of value": ("attention", (Q, K, K[:, :4], M), r"value: \(4, 4, 8\) .* shape of key, \(4, 5, 8\)"),
    "3-d mask": ("attention", (Q, K, K, M[0]), r"mask: \(1, 3, 5\) .* shape \(B, 1, Q, 5\)"),
    "mask of heads": ("attention", (Q, K, K, M.expand(2, 2, 3, 5)), r"mask: \(2, 2, 3, 5\) .* shape \(B, 1, Q, 5\)"),
    "keys of mask": ("attention", (Q, K, K, M[..., :4]), r"mask: \(2, 1, 3, 4\) .* shape \(B, 1, Q, 5\)"),
    "sequences of mask": ("attention", (Q[:3], K[:3], K[:3], M), r"mask: .* B a divisor of 3"),
    "no sequence in mask": ("attention", (Q, K, K, M[:0]), r"mask: .* B a divisor of 4"),
    "queries of mask": ("attention", (Q[:, :5], K, K, M), r"mask: .* Q of 5"),
    "no query in mask": ("attention", (Q, K, K, M[:, :, :0]), r"mask: .* Q of 6"),
    "dtype of key": ("attention", (Q, K.half(), K, M), "key: .* dtype of query, torch.float32"),
    "dtype of value": ("attention", (Q, K, K.half(), M), "value: .* dtype of query, torch.float32"),
    "dtype of mask": ("attention", (Q, K, K, M.bool()), "mask: .* dtype of query, torch.float32"),
    "backward": (BACK, (Q, Q, K, K, M[:0], W), r"mask: .* B a divisor of 4"),
    "shape of grad": (BACK, (K, Q, K, K, M, W), r"grad: \(4, 5, 8\) .* shape of query, \(4, 6, 8\)"),
    "dtype of grad": (BACK, (Q.half(), Q, K, K, M, W), "grad: .* dtype of query, torch.float32"),
    "width of weights": (BACK, (Q, Q, K, K, M, W[..., :5]), r"weights: \(4, 6, 5\) .* shape \(4, 6, 32\)"),
    "dtype of weights": (BACK, (Q, Q, K, K, M, W.half()), "weights: .* dtype of query, torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named(backend, name):
    op, args, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, backend=backend)
