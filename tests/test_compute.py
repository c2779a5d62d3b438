"""What a run computes with on a GPU that is only named."""

import re
import warnings

import pytest
import torch

from cascade_fast.runtime import compute
from cascade_fast.runtime.compute import Compute


@pytest.fixture
def card(monkeypatch):
    """Makes this machine one with a GPU of some compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    compute._warn_if_emulated.cache_clear()
    before = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    yield pretend
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before
    compute._warn_if_emulated.cache_clear()


@pytest.mark.parametrize(
    ("capability", "asked", "said"),
    [
        ((7, 5), "bfloat16", "compute capability 7.5 is emulated and slow .*; --dtype float16 is faster there"),
        ((6, 1), "bfloat16", "compute capability 6.1 is emulated and slow .*; --dtype float32 is faster there"),
        ((8, 0), "bfloat16", None),
        ((7, 5), "float16", None),
        ((7, 5), "auto", None),
    ],
)
def test_emulated_bfloat16_warns_once(card, capability, asked, said):
    card(*capability)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        chosen = [Compute.choose("cuda", asked) for _ in range(2)]
    assert chosen[0].dtype == (torch.float16 if asked == "auto" else getattr(torch, asked))
    assert len(warned) == (said is not None)
    assert all(re.search(said, str(w.message)) for w in warned)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_float16_products_on_a_gpu_sum_in_float32(card, device):
    card(7, 5)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    Compute.choose(device, "float16")
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction == (device == "cpu")
