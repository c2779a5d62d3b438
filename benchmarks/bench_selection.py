"""The steps of the selection under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

``selection.py`` is the one to quote: it lets the variants take turns. This one is for comparing two commits.
"""

import pytest
import torch

from benchmarks import selection

STEPS = ("score", "select", "gather", "scatter", "pipeline", "pipeline: eager", "pipeline: topk")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def timed(request, device):
    x = selection.make_inputs(131_072, 576, selection.DTYPES[request.param], 0.9, device)
    selection.check(x)
    return selection.variants(x)


@pytest.mark.parametrize("step", STEPS)
def test_selection(benchmark, device, timed, step):
    def run():
        result = timed[step]()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
