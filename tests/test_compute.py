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


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [(".", "memory.max", "memory.current", ""), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")],
)
def test_free_memory_is_at_most_what_the_control_group_has_left(tmp_path, monkeypatch, folder, limit, used, prefix):
    monkeypatch.setattr(compute, "CONTROL_GROUP", tmp_path)
    all_of_it = compute.free_ram_bytes()
    assert 0 < all_of_it <= compute.ram_bytes()
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text("1000000\n")
    (group / used).write_text("900000\n")
    (group / "memory.stat").write_text(f"{prefix}active_file 20000\n{prefix}inactive_file 3000\nanon 5\n")
    assert compute.ram_bytes() == 1e6
    assert compute.free_ram_bytes() == 123_000
    (group / limit).write_text("max\n")  # as version 2 says it
    assert compute.free_ram_bytes() > 1e6
