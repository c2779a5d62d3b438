"""The operator cross_entropy_: losses, entropies and gradients against float64, odd shapes, special values."""

import loss_cases as cases
import op_cases
import pytest
import torch

from cascade_fast import ops

SHAPES = ((0, 5), (1, 1), (3, 7), (5, 31), (4, 32), (7, 33), (2, 64), (9, 577), (3, 49_152))


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return op_cases.need(request.param)


@pytest.fixture
def op(backend):
    return lambda logits, labels, grad, scale: ops.cross_entropy_(
        logits, labels, grad=grad, scale=scale, backend=backend
    )


@pytest.mark.parametrize("scale", [1.0, 256.0])
@cases.dtypes
@pytest.mark.parametrize(("c", "v"), SHAPES)
def test_losses_entropies_and_gradients(op, c, v, dtype, scale):
    cases.check(op, *cases.inputs(c, v, dtype), scale)


@cases.special
def test_special_logits(op, case):
    case(op)


def test_thread_counts_and_runs_agree_bit_for_bit(backend):
    logits, labels = cases.inputs(64, 1001, torch.bfloat16)
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
    logits, labels = cases.inputs(5, 33, torch.float32)
    torch.library.opcheck(
        torch.ops.cascade_fast.cross_entropy_.default,
        (logits, labels),
        {"grad": grad, "scale": 2.0, "backend": backend},
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


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
def test_a_bad_scale_is_named(op, scale):
    with pytest.raises(ValueError, match=f"scale: {scale}; must be a positive number"):
        op(torch.zeros(1, 4), torch.tensor([0]), True, scale)


@pytest.mark.parametrize("label", [-1, 4])
def test_cpp_names_the_bad_label(label):
    op_cases.need("cpp")
    with pytest.raises(IndexError, match=rf"labels: entry 2 is {label}; must be in \[0, 4\)"):
        ops.cross_entropy_(torch.zeros(3, 4), torch.tensor([0, 1, label]), backend="cpp")
