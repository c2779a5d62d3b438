"""The operators rms_norm and silu_mul: outputs and gradients against float64, odd shapes, every compute dtype; and the
base that runs through them."""

import pytest
import torch

from cascade_fast import ops

CPU = torch.device("cpu")
EPS = 1e-5
SHAPES = ((0, 8), (1, 1), (3, 7), (5, 16), (31, 17), (33, 33), (97, 576), (64, 577))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    reason = ops.why_not("rms_norm", CPU, request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


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
            return reference.rms_norm_backward(grad, x, weight, inv_rms)

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


def test_compiles_as_one_graph(backend):
    x, weight, grad = _inputs(5, 33)

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
        (torch.zeros(3, 4).double(), torch.zeros(4), torch.float32, "x: .* float32, float16 or bfloat16"),
        (torch.zeros(3, 4), torch.zeros(3), torch.float32, "weight: .* shape \\(4,\\)"),
        (torch.zeros(3, 4), torch.zeros(4).half(), torch.float32, "weight: .* float32"),
        (torch.zeros(3, 4), torch.zeros(4), torch.float64, "dtype: torch.float64; must be float32, float16 or bf"),
    ],
)
def test_a_bad_argument_is_named(backend, x, weight, dtype, message):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(x, weight, EPS, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_takes_what_it_gives(backend, dtype):
    """The base's hidden states come in the compute dtype."""
    x, weight, grad = _inputs(33, 97, dtype)
    ours, truth = [x.to(dtype).to(d, copy=True).requires_grad_() for d in (dtype, torch.float64)]
    out, expected = ops.rms_norm(ours, weight, EPS, dtype=dtype, backend=backend), _plain(truth, weight.double())
    out.backward(grad)
    expected.backward(grad.double())
    eps = torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= expected.abs() * (eps / 2 + 1e-6) + 1e-7).all()
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=eps / 2 + 1e-5, atol=1e-5)


def _gate_inputs(n, f, dtype):
    generator = torch.Generator().manual_seed(n * 7 + f)
    return tuple((torch.randn(n, f, generator=generator) * 4).to(dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "f"), [(0, 5), (1, 1), (3, 31), (5, 64), (7, 1537)])
def test_silu_mul_and_its_gradients(backend, n, f, dtype):
    gate, up, grad = _gate_inputs(n, f, dtype)
    ours, truth = [[t.to(d, copy=True).requires_grad_() for t in (gate, up)] for d in (dtype, torch.float64)]
    out = ops.silu_mul(*ours, backend=backend)
    expected = torch.nn.functional.silu(truth[0]) * truth[1]
    out.backward(grad)
    expected.backward(grad.double())
    assert out.dtype == ours[0].grad.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    for a, b in ((out, expected), *((o.grad, t.grad) for o, t in zip(ours, truth, strict=True))):
        torch.testing.assert_close(a.double(), b, rtol=half + 2e-6, atol=2e-6)


def test_silu_mul_far_out(backend):
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, torch.nan, torch.inf, -torch.inf]])
    out = ops.silu_mul(gate, torch.ones_like(gate), backend=backend)
    torch.testing.assert_close(out[0, :6], torch.tensor([0.0, 0.0, 0.0, 0.0, 88.0, 1e4]), rtol=0.0, atol=1e-30)
    assert out[0, 6].isnan()
    assert out[0, 7] == torch.inf


def test_silu_mul_any_strides(backend):
    gate, up, _ = _gate_inputs(6, 9, torch.float32)
    strided = ops.silu_mul(gate.t().contiguous().t(), torch.stack([up, up], -1)[..., 1], backend=backend)
    torch.testing.assert_close(strided, ops.silu_mul(gate, up, backend=backend))


def test_silu_mul_opcheck(backend):
    gate, up, _ = _gate_inputs(3, 33, torch.float32)
    args = (gate.requires_grad_(), up.requires_grad_())
    torch.library.opcheck(torch.ops.cascade_fast.silu_mul.default, args, {"backend": backend})


def test_gradcheck_of_the_reference_silu_mul():
    from cascade_fast.ops import reference

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return reference.silu_mul(gate, up)

        @staticmethod
        def backward(ctx, grad):
            return reference.silu_mul_backward(grad, *ctx.saved_tensors)

    gate, up, _ = _gate_inputs(3, 4, torch.float64)
    assert torch.autograd.gradcheck(Gated.apply, (gate.requires_grad_(), up.requires_grad_()))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(4), torch.zeros(4), "gate: .* 2 dimensions"),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 4), "gate: .* float32, float16 or bfloat16"),
        (torch.zeros(3, 4), torch.zeros(3, 5), "up: .* shape, dtype and device of gate"),
        (torch.zeros(3, 4), torch.zeros(3, 4).half(), "up: .* shape, dtype and device of gate"),
    ],
)
def test_silu_mul_names_a_bad_argument(backend, gate, up, message):
    with pytest.raises(ValueError, match=message):
        ops.silu_mul(gate, up, backend=backend)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_fused_base_computes_what_transformers_does(family):
    import transformers

    from cascade_fast.fused_base import fuse

    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=50,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        plain = model(ids).logits
        fused = fuse(model)(ids).logits
    assert (
        sum("forward" in vars(m) for m in model.modules()) >= 2 * 3 + 1
    )  # two norms and an MLP a layer, the last norm
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
