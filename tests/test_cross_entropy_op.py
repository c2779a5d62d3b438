"""The operator cross_entropy_: losses, entropies and gradients against float64, odd shapes, special values."""

import op_cases as cases
import pytest
import torch

from cascade_fast import ops

SHAPES = ((0, 5), (1, 1), (3, 7), (5, 31), (4, 32), (7, 33), (2, 64), (9, 577), (3, 49_152))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return cases.need(request.param)


def _inputs(c, v, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(c * 100_003 + v)
    logits = torch.randn(c, v, generator=generator).mul_(scale).to(dtype)
    return logits, torch.randint(0, v, (c,), generator=generator)


def _truth(logits, labels):
    log_probs = logits.double().log_softmax(-1)
    loss = -log_probs.gather(1, labels[:, None]).squeeze(1)
    probs = log_probs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    return loss, entropy, probs.scatter_add(1, labels[:, None], torch.full((len(labels), 1), -1.0, dtype=torch.double))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("c", "v"), SHAPES)
def test_losses_entropies_and_gradients(backend, c, v, dtype):
    logits, labels = _inputs(c, v, dtype)
    loss, entropy, gradient = _truth(logits, labels)
    kept = logits.clone()
    for grad in (False, True):
        ours = ops.cross_entropy_(logits, labels, grad=grad, backend=backend)
        torch.testing.assert_close(ours[0], loss.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], entropy.float(), rtol=1e-5, atol=1e-5)
        if not grad:
            assert torch.equal(logits, kept)
    # Rounded once: half a unit in the last place of the dtype, besides float32's own error.
    info = torch.finfo(dtype)
    room = gradient.abs() * (info.eps / 2 + 1e-5) + max(1e-7, info.smallest_normal * info.eps)
    assert ((logits.double() - gradient).abs() <= room).all()


def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4]])
    loss, entropy = ops.cross_entropy_(logits, torch.tensor([0, 2]), grad=True, backend=backend)
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4 + 0.6931]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931]), rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, -1.0]]))


@pytest.mark.parametrize("v", [3, 40])
def test_a_logit_of_minus_infinity_is_a_probability_of_zero(backend, v):
    logits = torch.full((2, v), -torch.inf)
    logits[:, :2] = 1.0
    loss, entropy = ops.cross_entropy_(logits, torch.tensor([0, v - 1]), grad=True, backend=backend)
    torch.testing.assert_close(loss, torch.tensor([0.6931, torch.inf]), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(entropy, torch.full((2,), 0.6931), rtol=1e-4, atol=0.0)
    assert torch.equal(logits[1, 2:-1], torch.zeros(v - 3))
    assert torch.equal(logits[:, 1], torch.full((2,), 0.5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 17, 39])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_visible_in_their_own_row(backend, dtype, at, bad):
    logits = torch.randn(2, 40).to(dtype)
    logits[0, at] = bad
    loss, entropy = ops.cross_entropy_(logits, torch.tensor([3, 3]), grad=True, backend=backend)
    assert loss.isfinite().tolist() == entropy.isfinite().tolist() == [False, True]
    assert not logits[0].isfinite().all()
    assert logits[1].isfinite().all()


def test_labels_may_be_strided(backend):
    logits, labels = _inputs(6, 33, torch.float32)
    strided = torch.stack([labels, torch.full_like(labels, -7)], 1)[:, 0]
    loss, _ = ops.cross_entropy_(logits, strided, backend=backend)
    torch.testing.assert_close(loss, _truth(logits, labels)[0].float())


def test_thread_counts_and_runs_agree_bit_for_bit(backend):
    logits, labels = _inputs(64, 1001, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            room = logits.clone()
            results.append((*ops.cross_entropy_(room, labels, grad=True, backend=backend), room))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad):
    logits, labels = _inputs(5, 33, torch.float32)
    torch.library.opcheck(
        torch.ops.cascade_fast.cross_entropy_.default, (logits, labels), {"grad": grad, "backend": backend}
    )


def test_compiles_as_one_graph(backend):
    def losses(hidden, weight, labels):
        logits = hidden @ weight.T
        loss, _ = ops.cross_entropy_(logits, labels, grad=True, backend=backend)
        return loss, logits @ weight

    hidden, weight, labels = torch.randn(6, 8), torch.randn(33, 8), torch.randint(0, 33, (6,))
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(hidden, weight, labels)
    for ours, plain in zip(compiled, losses(hidden, weight, labels), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "logits: .* 2 dimensions"),
        (torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64), "logits: .*float32, float16 or bfloat16"),
        (torch.zeros(4, 3).T, torch.zeros(3, dtype=torch.int64), "logits: strides .* contiguous"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), "labels: .* shape \\(3,\\)"),
        (torch.zeros(3, 4), torch.zeros(3), "labels: .* int64"),
    ],
)
def test_a_bad_argument_is_named(backend, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy_(logits, labels, backend=backend)


@pytest.mark.parametrize("label", [-1, 4])
def test_cpp_names_the_bad_label(label):
    cases.need("cpp")
    with pytest.raises(IndexError, match=rf"labels: entry 2 is {label}; must be in \[0, 4\)"):
        ops.cross_entropy_(torch.zeros(3, 4), torch.tensor([0, 1, label]), backend="cpp")
