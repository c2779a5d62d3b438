"""``python -m benchmarks.gpu``, small: on a card with ``make test-gpu``, and on a pretend one where there is one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PRETEND = ["-m", "pretend_gpu", "--card", "t4", "--poison", "--late-copies"]
STEPS = ("naive loop", "seed", "warm", "second-look", "lora")


def bench(*before: str, to: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *before, "-m", "benchmarks.gpu", "--tiny", "--json", str(to)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([], marks=pytest.mark.gpu, id="card"),
        pytest.param(PRETEND, marks=pytest.mark.emulated, id="pretend"),
    ],
)
def test_every_part_leaves_its_numbers(before, tmp_path):
    if before and importlib.util.find_spec("pretend_gpu") is None:
        pytest.skip("the package pretend_gpu is not on the path")
    done = bench(*before, to=tmp_path / "gpu.jsonl")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (line,) = (tmp_path / "gpu.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["errors"] == {}
    assert (
        result["environment"]["peak_bytes_per_second"] is None or result["environment"]["peak_bytes_per_second"] > 1e11
    )
    assert {"to the card, pinned", "to the card, pageable", "on the card"} <= set(result["copies"])
    for op in ("score", "select", "gather", "scatter"):
        assert result["selection"][op]["GB/s"] > 0
    assert result["loss"]["cross_entropy_ with gradient"]["GB/s"] > 0
    assert set(result["optimizer"]) == {"adamw", "adamw8bit"}
    assert tuple(result["steps"]) == STEPS
    for name, step in result["steps"].items():
        assert step["tokens/s"] == pytest.approx(step["tokens"] / step["seconds"]["p50"])
        assert (name == "naive loop") or {"kernels", "waits", "planned", "times naive"} <= set(step)
        assert (name == "naive loop") or 0 < step["peak bytes"] < 2**30
    for step in result["base pass"].values():
        assert step["tokens/s"] > 0
    for part in ("copies", "products", "selection", "loss", "optimizer", "steps", "base pass"):
        assert f"\n{part} " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path, monkeypatch, capsys):
    from benchmarks import gpu

    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--json", str(tmp_path / "gpu.jsonl")])
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("benchmarks.gpu: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "gpu.jsonl").exists()
