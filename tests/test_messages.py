"""What a run says at its start about its operators, against what it then calls."""

import pytest
import torch

from cascade_fast.cascade import run_cascade
from cascade_fast.ops import backends, schema
from cascade_fast.settings import make_settings
from cascade_fast.training.messages import operators_of

GPU = torch.device("cuda")  # named only
LAYERS = "cross_entropy_, rms_norm, add_rms_norm, silu_mul"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, f"select_hard, gather_rows: cpp on cpu; {LAYERS}, grad_norm, adamw_: cuda on cuda"),
        ({"store": "device"}, f"select_hard, gather_rows, {LAYERS}, grad_norm, adamw_: cuda on cuda"),
        (
            {"criterion": "cosine", "optimizer": "adamw8bit"},
            f"select_hard, gather_rows: cpp on cpu; cosine_score, {LAYERS}, adamw8bit: cuda on cuda",
        ),
        (
            {"stage_kind": "second-look", "hard_ratio": 1.0, "adapter": "lora"},
            f"gather_rows: cpp on cpu; {LAYERS}, place_heads, take_heads, grad_norm, adamw_: cuda on cuda; "
            "low_rank, scale_into_: reference on cuda",
        ),
        (
            {"preset": "lora", "base_quantization": "nf4", "optimizer": "paged_adamw8bit"},
            f"gather_rows: cpp on cpu; {LAYERS}, place_heads, take_heads: cuda on cuda",
        ),
    ],
)
def test_the_stores_are_served_where_they_are(monkeypatch, settings, said):
    monkeypatch.delenv("CASCADE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(backends, "why_not", lambda op, device, backend: None)
    assert operators_of(make_settings(settings), GPU) == said


def test_a_gpu_without_the_extension_s_cuda_part(monkeypatch):
    """Triton's kernels run; what has none is torch's own, or is not called."""
    monkeypatch.delenv("CASCADE_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(backends, "why_not", lambda op, device, backend: "none" if backend == "cuda" else None)
    said = operators_of(make_settings({"stage_kind": "second-look", "store": "device"}), GPU)
    assert said == f"select_hard, gather_rows, {LAYERS}, rotate_rows: triton on cuda; grad_norm: reference on cuda"


@pytest.mark.parametrize("kind", ["append", "second-look"])
@pytest.mark.parametrize("criterion", ["entropy", "cosine"])
@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_the_operators_named_are_those_that_run(look_settings, tmp_path, monkeypatch, kind, criterion, ratio):
    called = set()
    real = backends.body

    def body(op, device, backend):
        called.add(op)
        return real(op, device, backend)

    monkeypatch.setattr(schema.backends, "body", body)
    changes = {"stage_kind": kind, "criterion": criterion, "hard_ratio": ratio, "num_stages": 1, "out": str(tmp_path)}
    settings = make_settings({**look_settings, **changes})
    run_cascade(settings)
    said = operators_of(settings, torch.device("cpu"))
    named = {op for part in said.split("; ") for op in part.split(": ")[0].split(", ")}
    assert named == {op for op in called if not op.endswith("_backward")}
