"""The operator rms_norm: outputs and gradients against float64, odd shapes, every compute dtype."""

import op_cases as cases
import pytest
import torch

from cascade_fast import ops

EPS = 1e-5
SHAPES = ((0, 8), (1, 1), (3, 7), (5, 16), (31, 17), (33, 33), (97, 576), (64, 577))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return cases.need(request.param)


def _inputs(n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1009 + d)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((n, d), (d,), (n, d)))
    return x.mul_(3.0), weight, grad.to(dtype)


def _plain(x, weight):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_output_and_gradients(backend, n, d, dtype):
    x, weight, grad = _inputs(n, d, dtype)
    truth = [t.double().requires_grad_() for t in (x, weight)]
    expected = _plain(*truth)
    expected.backward(grad.double())
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    out = ops.rms_norm(*ours, EPS, dtype=dtype, backend=backend)
    out.backward(grad)
    assert out.dtype == dtype
    assert out.shape == x.shape
    # Rounded once to its dtype.
    assert ((out.double() - expected).abs() <= expected.abs() * (torch.finfo(dtype).eps / 2 + 1e-6) + 1e-7).all()
    for a, b in zip(ours, truth, strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_partial_gradients(backend, wanted):
    x, weight, grad = _inputs(9, 33)
    ours = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
    ops.rms_norm(*ours, EPS, dtype=torch.float32, backend=backend).backward(grad)
    assert [t.grad is not None for t in ours] == list(wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_a_weight_s_gradient_is_made_only_if_asked_for(backend, n, d, dtype):
    x, weight, grad = _inputs(n, d, dtype)
    args = grad, x, weight, torch.rsqrt(x.square().mean(-1) + EPS)
    backward = torch.ops.cascade_fast.rms_norm_backward
    both = backward(*args, backend=backend)
    assert [t.shape for t in both] == [x.shape, weight.shape]
    one, none = backward(*args, False, backend=backend)
    assert torch.equal(one, both[0])
    assert none.shape == (0,)


@pytest.mark.parametrize("asked", [True, False])
def test_a_weight_that_is_not_trained_asks_for_no_gradient(backend, monkeypatch, asked):
    from cascade_fast.ops import backends

    real, seen = backends.body, []

    def body(op, *where):
        found = real(op, *where)
        return (lambda *args: (seen.append(args[-1]), found(*args))[1]) if op == "rms_norm_backward" else found

    monkeypatch.setattr(backends, "body", body)
    x, weight, grad = _inputs(5, 33)
    weight.requires_grad_(asked)
    ops.rms_norm(x.requires_grad_(), weight, EPS, dtype=torch.float32, backend=backend).backward(grad)
    assert seen == [asked]


def test_any_strides(backend):
    x, weight, grad = _inputs(9, 34)
    expected = ops.rms_norm(x, weight, EPS, dtype=torch.float32, backend=backend)
    for other in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0]):
        assert not other.is_contiguous()
        ours = other.detach().requires_grad_()
        out = ops.rms_norm(ours, torch.stack([weight, weight], -1)[:, 0], EPS, dtype=torch.float32, backend=backend)
        torch.testing.assert_close(out, expected)
        out.backward(grad.t().contiguous().t())
        truth = x.clone().requires_grad_()
        _plain(truth, weight).backward(grad)
        torch.testing.assert_close(ours.grad, truth.grad)


def test_gradcheck_of_the_reference():
    from cascade_fast.ops import reference

    x, weight = (t.double().requires_grad_() for t in _inputs(4, 5)[:2])

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            out, inv_rms = reference.rms_norm(x, weight, EPS, torch.float64)
            ctx.save_for_backward(x, weight, inv_rms)
            return out

        @staticmethod
        def backward(ctx, grad):
            x, weight, inv_rms = ctx.saved_tensors
            return reference.rms_norm_backward(grad, x, weight, inv_rms, True)

    assert torch.autograd.gradcheck(Norm.apply, (x, weight))


def test_a_row_of_zeros_and_a_row_with_nan(backend):
    x, weight, grad = _inputs(3, 20)
    x[0], x[1, 7] = 0.0, torch.nan
    ours = x.clone().requires_grad_()
    out = ops.rms_norm(ours, weight, EPS, dtype=torch.bfloat16, backend=backend)
    out.backward(grad.bfloat16())
    assert torch.equal(out[0], torch.zeros(20, dtype=torch.bfloat16))
    assert out[1].isnan().all()
    assert out[2].isfinite().all()
    torch.testing.assert_close(ours.grad[0], (grad[0].bfloat16().float() * weight) / EPS**0.5)


def test_thread_counts_and_runs_agree_bit_for_bit(backend):
    x, weight, grad = _inputs(300, 65, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            ours = [t.clone().requires_grad_() for t in (x, weight)]
            out = ops.rms_norm(*ours, EPS, dtype=torch.bfloat16, backend=backend)
            out.backward(grad)
            results.append((out.detach(), ours[0].grad, ours[1].grad))
    finally:
        torch.set_num_threads(threads)
    if backend == "cpp":  # torch's own sums may depend on the number of threads
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_opcheck(backend):
    x, weight, _ = _inputs(5, 33)
    args = (x.requires_grad_(), weight.requires_grad_(), EPS)
    torch.library.opcheck(torch.ops.cascade_fast.rms_norm.default, args, {"dtype": torch.bfloat16, "backend": backend})


@pytest.mark.parametrize("weight_grad", [True, False])
def test_opcheck_of_the_gradient(backend, weight_grad):
    x, weight, grad = _inputs(5, 33)
    args = grad, x, weight, torch.rsqrt(x.square().mean(-1) + EPS), weight_grad
    torch.library.opcheck(torch.ops.cascade_fast.rms_norm_backward.default, args, {"backend": backend})


@pytest.mark.parametrize("trained", [True, False])
def test_compiles_as_one_graph(backend, trained):
    x, weight, grad = _inputs(5, 33)
    weight.requires_grad_(trained)

    def norm(x, weight):
        return ops.rms_norm(x * 2, weight, EPS, dtype=torch.bfloat16, backend=backend)

    ours = x.clone().requires_grad_()
    out = torch.compile(norm, fullgraph=True, backend="aot_eager")(ours, weight)
    out.backward(grad.bfloat16())
    plain = x.clone().requires_grad_()
    norm(plain, weight).backward(grad.bfloat16())
    assert torch.equal(out, norm(x, weight))
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize(
    ("x", "weight", "dtype", "message"),
    [
        (torch.zeros(3), torch.zeros(3), torch.float32, "x: .* 2 dimensions"),
        (torch.zeros(3, 4).bfloat16(), torch.zeros(4), torch.float32, "x: .* float32"),
        (torch.zeros(3, 4), torch.zeros(3), torch.float32, "weight: .* shape \\(4,\\)"),
        (torch.zeros(3, 4), torch.zeros(4).half(), torch.float32, "weight: .* float32"),
        (torch.zeros(3, 4), torch.zeros(4), torch.float64, "dtype: torch.float64; must be float32, float16 or bf"),
    ],
)
def test_a_bad_argument_is_named(backend, x, weight, dtype, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(x, weight, EPS, dtype=dtype, backend=backend)
