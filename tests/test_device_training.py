"""Training on a GPU ends as it does on the CPU: same hard tokens, same exits, losses to rounding.

Each run is a process: on a card with ``make test-gpu``; and on a pretend one, with memory that is NaN until it is
written and copies that arrive late, where the package pretend_gpu is on the path.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cascade_fast.model.export import export

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


LOOKED_UP = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from cascade_fast import HardTokenNeighbors, neighbors

run, made, used, device = sys.argv[1:]
assert neighbors.main([run, made, "--device", device, "--dtype", "float32"]) == 0
model = AutoModelForCausalLM.from_pretrained(used, dtype=torch.float32, trust_remote_code=False).to(device)
HardTokenNeighbors.from_pretrained(used).attach(model)
ids = (torch.arange(48).view(2, 24) * 7 % 100 + 3).to(device)
with torch.no_grad():
    written = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    save_file({"logits": model(ids).logits.cpu(), "written": written.cpu()}, made + ".safetensors")
"""


def test_neighbors_are_looked_up_as_on_the_cpu(python, tiny_settings, tmp_path):
    """The command's numbers; and, of the same neighbors, a model's logits and what it writes."""
    changes = {**RUNS["adapters, every token"], "num_stages": 1, "dtype": "float32"}
    train([sys.executable], tiny_settings, tmp_path, "cpu", **changes)
    (tmp_path / "looked_up.py").write_text(LOOKED_UP)
    told, models = {}, {device: tmp_path / f"model-{device}" for device in ("cpu", "cuda")}
    for device, command in (("cpu", [sys.executable]), ("cuda", python)):
        export(str(tmp_path / "cpu"), models[device], format="merged")
        words = ["looked_up.py", tmp_path / "cpu", models[device], models["cpu"], device]
        done = subprocess.run(
            [*command, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told[device] = [float(number) for number in re.findall(r"\d+\.\d{4}", done.stdout)]
    (alone, mixed), (alone_cpu, mixed_cpu) = ((n[::2], n[1::2]) for n in (told["cuda"], told["cpu"]))
    assert len(alone_cpu) == len(mixed_cpu) == 2
    assert alone == pytest.approx(alone_cpu, abs=1e-4)
    # Keys are of 16 bit: a last bit of a state decides here and there which token is the 256th.
    assert mixed == pytest.approx(mixed_cpu, rel=1e-3)
    assert all(mixed < 0.95 * alone for mixed, alone in zip(mixed_cpu, alone_cpu, strict=True))
    cpu, cuda = (load_file(f"{models[device]}.safetensors") for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda["logits"], cpu["logits"], rtol=1e-3, atol=1e-3)
    assert torch.equal(cuda["written"], cpu["written"])
