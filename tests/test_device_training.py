"""Training on a GPU ends as it does on the CPU: same hard tokens, same exits, losses to rounding.

Each run is a process: on a card with ``make test-gpu``; and on a pretend one, with memory that is NaN until it is
written and copies that arrive late, where the package pretend_gpu is on the path.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

RUNS = {
    "warm": {},
    "warm, from the host": {"store": "host"},
    "second-look": {"stage_kind": "second-look", "kv": "store"},
    "second-look, from the host": {"stage_kind": "second-look", "kv": "store", "store": "host"},
    "second-look, recompute": {"stage_kind": "second-look", "kv": "recompute", "num_stages": 1},
    "adapters": {"stage_kind": "second-look", "adapter": "lora", "lora_rank": 4},
    "adapters, every token": {"stage_kind": "second-look", "adapter": "lora", "hard_ratio": 1, "num_stages": 1},
    "adapters, easy tokens forward": {
        "stage_kind": "second-look",
        "adapter": "lora",
        "lora_rank": 4,
        "num_stages": 1,
        "easy_tokens": "forward",
    },
    "seed": {"preset": "seed", "num_stages": 2},
}
SLOW = (
    "warm, from the host",
    "second-look, from the host",
    "second-look, recompute",
    "adapters",
    "adapters, easy tokens forward",
    "seed",
)  # on the pretend card
HALF = {"warm": {}, "adapters, every token": RUNS["adapters, every token"]}
LOSSES = ("val_ppl", "all_token_val_ppl", "all_token_test_ppl", "train_loss", "val_loss")


@pytest.fixture(
    params=[pytest.param("card", marks=pytest.mark.gpu), pytest.param("pretend card", marks=pytest.mark.emulated)]
)
def python(request) -> list[str]:
    """The command that runs a module on a GPU."""
    if request.param == "card":
        return [sys.executable]
    if importlib.util.find_spec("pretend_gpu") is None:
        pytest.skip("the package pretend_gpu is not on the path")
    return [sys.executable, "-m", "pretend_gpu", "--card", "t4", "--poison", "--late-copies"]


def train(command, settings, folder, device, **changes) -> dict:
    """Results of a run of ``python -m cascade_fast.train``."""
    asked = {
        **settings, "num_stages": 2, "accept": "always", "store_dtype": "float32", "general_dataset": "none",
        "out": str(folder / device), "cache_dir": str(folder / f"cache {device}"), **changes, "device": device,
    }  # fmt: skip
    file = folder / f"{device}.json"
    file.write_text(json.dumps(asked))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "cascade_fast.train", "--config", str(file)],
        capture_output=True, text=True, timeout=600, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / device / "results.json").read_text())


def numbers(results: dict) -> dict[str, float]:
    """Every loss and perplexity of a run."""
    found = {f"final {name}": results["final"][name] for name in LOSSES if results["final"].get(name) is not None}
    for stage in results["stages"]:
        for epoch in stage["epochs"]:
            found |= {f"stage {stage['stage']} {epoch['epoch']} {n}": epoch[n] for n in ("train_loss", "val_loss")}
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RUNS])
def test_a_run_in_float32_ends_as_on_the_cpu(python, tiny_settings, tmp_path, name):
    changes = {"dtype": "float32", **RUNS[name]}
    cpu = train([sys.executable], tiny_settings, tmp_path, "cpu", **changes)
    gpu = train(python, tiny_settings, tmp_path, "cuda", **changes)
    tolerance = 1e-6 if len(python) > 1 else 1e-4  # a card sums in another order
    assert numbers(gpu) == pytest.approx(numbers(cpu), rel=tolerance)
    assert len(gpu["stages"]) == len(cpu["stages"]) >= 1
    for ours, theirs in zip(gpu["stages"], cpu["stages"], strict=True):
        for key in ("train_hard", "val_hard", "best_epoch"):
            assert ours[key] == theirs[key], key
        assert ours["threshold"] == pytest.approx(theirs["threshold"], rel=tolerance)
        assert ours["exit_share"] == pytest.approx(theirs["exit_share"], abs=0 if len(python) > 1 else 0.01)


@pytest.mark.parametrize("name", HALF)
def test_a_run_in_float16_ends_near_the_cpus(python, tiny_settings, tmp_path, name):
    cpu = train([sys.executable], tiny_settings, tmp_path, "cpu", **HALF[name], dtype="float32")
    gpu = train(python, tiny_settings, tmp_path, "cuda", **HALF[name], dtype="float16")
    assert numbers(gpu) == pytest.approx(numbers(cpu), rel=0.02)
