"""Which backend serves an operator: chosen, asked for by name, or by the environment."""

import warnings

import op_cases as cases
import pytest
import torch

from cascade_fast import ops
from cascade_fast.ops import backends

CPU = torch.device("cpu")
NATIVE = torch.ops.cascade_fast
H = torch.zeros(4, 3)


def test_auto_takes_the_extension_on_the_cpu(monkeypatch):
    monkeypatch.delenv("CASCADE_FAST_BACKEND", raising=False)
    cases.need("cpp")
    served = {op: ops.choose(op, CPU) for op in ops.OPS}
    assert {op for op, by in served.items() if by == "reference"} == set(ops.GPU_OPS)
    assert set(served.values()) == {"cpp", "reference"}


@pytest.mark.parametrize("op", ops.SELECTION_OPS)
def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error(op):
    args, keywords = cases.one_call_of_each(4, 3)[op]
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run {op}: it serves CUDA tensors"):
        getattr(NATIVE, op)(*args, **keywords, backend="cuda")


@pytest.mark.parametrize(
    ("capability", "without", "taken"),
    [
        ((8, 0), "", "triton"),
        ((8, 0), "triton", "cuda"),
        ((7, 5), "", "cuda"),
        ((7, 5), "cuda", "triton"),
        ((7, 5), "cuda triton", "reference"),
        ((7, 0), "cuda", "reference"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, capability, without, taken):
    def why_not(op, device, backend):
        return f"no {backend}" if backend in without.split() else None

    monkeypatch.delenv("CASCADE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(backends, "why_not", why_not)
    backends._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert {ops.choose(op, torch.device("cuda")) for op in ops.SELECTION_OPS} == {taken}
    first = without.split()[:1]
    said = [f"cascade_fast: cuda operators run on {taken}, not {name}: no {name}" for name in first]
    assert [str(w.message) for w in warned] == said


class _Driver:
    """Triton's, which fails as it does without a compiler, or works."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    @property
    def active(self):
        return self

    def get_current_target(self) -> str:
        if self.error is not None:
            raise self.error
        return "cuda:75"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, None),
        (
            AssertionError("libcuda.so cannot found!\nsecond line"),
            "Triton cannot use the GPU: libcuda.so cannot found!",
        ),
        (RuntimeError(), "Triton cannot use the GPU: RuntimeError"),
    ],
)
def test_a_triton_that_cannot_start_is_not_taken(monkeypatch, error, reason):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("triton.runtime.driver", _Driver(error))
    backends._triton_cannot_start.cache_clear()
    try:
        assert {ops.why_not(op, torch.device("cuda"), "triton") for op in ops.SELECTION_OPS} == {reason}
    finally:
        backends._triton_cannot_start.cache_clear()


def test_environment_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("CASCADE_FAST_BACKEND", "reference")
    assert ops.choose("select_hard", CPU) == "reference"
    monkeypatch.setenv("CASCADE_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="CASCADE_FAST_BACKEND='cuda' cannot run cosine_score"):
        ops.cosine_score(H, H)
    assert ops.cosine_score(H, H, backend="reference").tolist() == [0.0] * 4
    monkeypatch.setenv("CASCADE_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="CASCADE_FAST_BACKEND='fastest': must be one of auto, reference"):
        ops.cosine_score(H, H)
    with pytest.raises(ValueError, match="backend='fastest'"):
        ops.cosine_score(H, H, backend="fastest")
