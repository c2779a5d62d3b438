"""HardTokenGather under torch.compile, and what makes the host wait for a GPU."""

import pytest
import torch
from hard_token_cases import BACKENDS, DTYPES, as_given, hidden, some_mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_fast import ops
from cascade_fast.criteria import get_criterion, register_criterion
from cascade_fast.hard_token_gather import HardTokenGather


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_compiles_without_a_graph_break(scope, masked, backend):
    mask, lengths = some_mask(4, 9) if masked else (None, None)
    n_real = None if lengths is None else lengths if scope == "sequence" else sum(lengths)
    gather = HardTokenGather(0.6, scope=scope, backend=backend)

    def step(h_in, h_out, label):
        hard = gather(h_in, h_out, mask, carry=(label,), n_real=n_real)
        return hard, hard.scatter(hard.hidden_KD * 2, into=h_out)

    h_in, h_out = hidden(4, 9)
    label = torch.arange(36).view(4, 9)
    eager_in, compiled_in = h_out.clone().requires_grad_(), h_out.clone().requires_grad_()
    hard, full = step(h_in, eager_in, label)
    compiled_hard, compiled_full = torch.compile(step, fullgraph=True, backend="aot_eager")(h_in, compiled_in, label)
    assert torch.equal(compiled_full, full)
    for name in ("hidden_KD", "index_K", "scores", "threshold"):
        assert torch.equal(getattr(compiled_hard, name), getattr(hard, name)), name
    assert torch.equal(compiled_hard.carried[0], hard.carried[0])
    full.square().sum().backward()
    compiled_full.square().sum().backward()
    assert torch.equal(compiled_in.grad, eager_in.grad)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """torch compiles one function so many times only."""
    torch._dynamo.reset()


class Router(torch.nn.Linear):
    def forward(self, h_in_ND, h_out_ND, *, logits=None):
        return super().forward(h_out_ND).squeeze(-1)


@pytest.mark.parametrize(
    "criterion",
    ["entropy", "random", "a name", as_given, Router(12, 1), get_criterion("cosine")],
    ids=["entropy", "random", "registered", "function", "module", "object"],
)
@pytest.mark.usefixtures("own_criteria")
def test_every_kind_of_criterion_compiles(criterion):
    register_criterion("a name", needs_logits=True)(lambda h_in_ND, h_out_ND, *, logits: logits.flatten(0, 1)[:, 0])
    gather = HardTokenGather(0.6, criterion=criterion)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    h_in, h_out = hidden(4, 9)
    logits = torch.randn(4, 9, 20)
    torch.manual_seed(1)
    hard = gather(h_in, h_out, logits=logits)
    torch.manual_seed(1)
    again = compiled(h_in, h_out, logits=logits)
    assert torch.equal(again.scores, hard.scores)
    assert torch.equal(again.hidden_KD, hard.hidden_KD)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_compiles_once_for_any_size(scope):
    gather = HardTokenGather(0.6, scope=scope)
    compiled = torch.compile(gather, fullgraph=True, backend="eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        compiled(*hidden(3, 8))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 17), (5, 64)):
            h_in, h_out = hidden(*shape)
            hard, plain = compiled(h_in, h_out), gather(h_in, h_out)
            assert torch.equal(hard.index_K, plain.index_K)
            assert torch.equal(hard.threshold, plain.threshold)


def test_threshold_compiles_where_dynamic_shapes_are_captured():
    gather = HardTokenGather(threshold=0.0)

    def step(h_in, h_out):
        hard = gather(h_in, h_out)
        return hard.scatter(hard.hidden_KD * 2, into=h_out)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            h_in, h_out = hidden(4, 9)
            assert torch.equal(compiled(h_in, h_out), step(h_in, h_out))


class WaitingMethods(TorchFunctionMode):
    """Notes the tensor methods that make the host wait for a value."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class WaitingOperators(TorchDispatchMode):
    """Notes the operators that do. Those inside the body of an operator of ours are not seen."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def waits(function):
    with WaitingMethods() as methods, WaitingOperators() as operators:
        function()
    return methods.seen + operators.seen


def there_and_back(gather, h_in, h_out, *args, **kwargs):
    hard = gather(h_in, h_out, *args, **kwargs)
    return hard, hard.scatter(hard.hidden_KD * 2, into=h_out)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_what_waits(scope):
    h_in, h_out = hidden(4, 9)
    mask, _ = some_mask(4, 9)
    ratio, threshold = HardTokenGather(0.6, scope=scope), HardTokenGather(threshold=0.0, scope=scope)
    assert waits(lambda: there_and_back(ratio, h_in, h_out, carry=(mask,))) == []
    assert waits(lambda: there_and_back(ratio, h_in, h_out, mask)) == ["tolist"]
    assert waits(lambda: there_and_back(threshold, h_in, h_out, mask)) == ["nonzero"]


def test_the_plain_bodies_of_the_operators_do_not_wait():
    a, b = hidden(6)
    index = torch.arange(3)
    assert waits(lambda: ops.reference.cosine_score(a, b)) == []
    assert waits(lambda: ops.reference.select_hard(a, 3)) == []
    assert waits(lambda: ops.reference.gather_rows(a, index, [])) == []
    assert waits(lambda: ops.reference.scatter_rows(a[:3], index, b, True)) == []


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_pretended_gpu_is_never_asked_for_a_value(scope):
    """Fake CUDA tensors have no values: whoever asks for one gets an error."""
    _, lengths = some_mask(4, 9)
    n_real = lengths if scope == "sequence" else sum(lengths)
    gather = HardTokenGather(0.6, scope=scope)
    with FakeTensorMode():
        h_in, h_out = torch.empty(4, 9, 12, device="cuda"), torch.empty(4, 9, 12, device="cuda")
        mask = torch.empty(4, 9, dtype=torch.bool, device="cuda")
        for given in ({}, {"mask": mask, "n_real": n_real}):
            hard, full = there_and_back(gather, h_in, h_out, **given)
            assert {t.device.type for t in (hard.index_K, hard.threshold, hard.scores, full)} == {"cuda"}
        with pytest.raises(RuntimeError):
            gather(h_in, h_out, mask)
        with pytest.raises(RuntimeError):
            HardTokenGather(threshold=0.0)(h_in, h_out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_gpu_equals_cpu_and_does_not_wait(scope, dtype):
    h_in, h_out = hidden(5, 11, dtype=dtype)
    mask, lengths = some_mask(5, 11)
    n_real = lengths if scope == "sequence" else sum(lengths)
    gather = HardTokenGather(0.6, scope=scope, criterion=as_given)
    on_gpu = [t.cuda() for t in (h_in, h_out, mask)]
    for given in ({}, {"mask": mask, "n_real": n_real}, {"mask": mask}):
        expected, expected_full = there_and_back(gather, h_in, h_out, **given)
        moved = {**given, "mask": on_gpu[2]} if "n_real" in given else given  # the last one stays on the CPU
        there_and_back(gather, on_gpu[0], on_gpu[1], **moved)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            hard, full = there_and_back(gather, on_gpu[0], on_gpu[1], **moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(hard.index_K.cpu(), expected.index_K)
        assert torch.equal(hard.threshold.cpu(), expected.threshold)
        assert torch.equal(full.cpu(), expected_full)
