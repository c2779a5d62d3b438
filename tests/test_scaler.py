"""Loss scale, clip and left-out steps within the optimizer: as in passes of their own, and nothing waits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cascade_fast.training.adamw8bit import AdamW8bit
from cascade_fast.training.scaler import FoldingScaler

SHAPES = [(64, 80), (300,), (7, 5)]


def make_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 20) for shape in SHAPES]


def give_gradients(params, step, scale, value=None):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.02 * scale
    if value is not None:
        params[1].grad[7] = value


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("enabled", [True, False], ids=["float16", "other dtypes"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, fused=True), AdamW8bit], ids=["adamw", "adamw8bit"])
def test_a_folded_step_is_the_plain_one(make, enabled, clip):
    ours, theirs = make_parameters(), make_parameters()
    folding, plain = make(ours), make(theirs)
    options = {"init_scale": 1024.0, "growth_interval": 2, "enabled": enabled}
    our_scaler, scaler = FoldingScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)
    for s in (our_scaler, scaler):
        s.scale(torch.ones(()))  # makes the scale
    scales = []
    for step in range(9):
        value = {2: torch.inf, 3: torch.nan, 6: -torch.inf}.get(step) if enabled else None
        scale = scaler.get_scale() if enabled else 1.0
        give_gradients(ours, step, scale, value)
        give_gradients(theirs, step, scale, value)
        norm = our_scaler.fold(folding, [p.grad for p in ours], clip)
        assert (norm is None) == (not enabled and clip == 0)

        if enabled:
            scaler.unscale_(plain)
        if clip > 0:
            true_norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
            torch.testing.assert_close(norm / scale, true_norm, equal_nan=True)
        scaler.step(plain)
        scaler.update()

        assert our_scaler.state_dict() == scaler.state_dict()
        scales.append(scaler.get_scale())
        for p, q in zip(ours, theirs, strict=True):  # a step is about 1e-3
            torch.testing.assert_close(p, q, atol=2e-9 * (step + 1), rtol=3e-7)
    assert len(set(scales)) == (3 if enabled else 1)  # it has grown and shrunk
    for a, b in zip(folding.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True):
        assert int(a["step"]) == int(b["step"]) == (6 if enabled else 9)
    assert not hasattr(folding, "grad_scale") or folding.grad_scale is None


@pytest.mark.emulated
def test_launches_of_the_optimizer_on_a_pretend_card():
    """What is launched for gradients that are there; and nothing in a step waits."""
    if importlib.util.find_spec("pretend_gpu") is None:
        pytest.skip("the package pretend_gpu is not on the path")
    program = Path(__file__).with_name("optimizer_launches.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    # Norm and factors 2; AdamW 2, its steps and the update; of 8 bit 2, the update and the steps left out; scale 1.
    assert counted == {
        "adamw float16 clip": 5,
        "adamw float16": 5,
        "adamw float32 clip": 4,
        "adamw float32": 2,
        "adamw8bit float16 clip": 5,
        "adamw8bit float32": 1,
    }
