"""Small runs whose numbers are on record: what must stay the same, bit for bit, when code is moved or rewritten.

``python tests/golden_runs.py FILE`` writes the record; ``test_golden.py`` compares with ``golden_runs.json``. Record
again only where numbers are meant to change, and say so in the log. Only commands are used, so that the same file runs
on another commit.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from conftest import english_texts, save_tiny_base
from safetensors.torch import load_file

SMALL = {
    "seq_len": 32, "train_blocks": 40, "val_blocks": 12, "test_blocks": 12, "layers_per_stage": 2, "num_stages": 2,
    "epochs": 2, "batch_tokens": 64, "lr": 3e-3, "accept": "always", "dtype": "float32",
    "general_dataset": "none",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "append": {},
    "append, bfloat16": {"dtype": "bfloat16"},
    "append, cosine": {"criterion": "cosine", "num_stages": 3},
    "append, random": {"criterion": "random"},
    "append, 8 bit, micro batches": {"optimizer": "adamw8bit", "micro_batch_tokens": 16, "grad_clip": 0.5},
    "append, stops": {"accept": "better", "min_improvement": 0.02, "epochs": 6, "lr": 2e-2, "num_stages": 3},
    "second-look": {"stage_kind": "second-look", "kv": "store"},
    "second-look, bfloat16": {"stage_kind": "second-look", "kv": "store", "dtype": "bfloat16"},
    "second-look, recompute": {"stage_kind": "second-look", "kv": "recompute", "criterion": "cosine"},
    "second-look, exit thresholds": {"stage_kind": "second-look", "kv": "store", "exit_threshold": "validation"},
    "seed": {"preset": "seed"},
}
MODELS = ("append", "append, cosine", "second-look", "second-look, bfloat16", "seed")  # evaluated, and write text
PLANS: dict[str, list[str]] = {
    "t4": ["--device", "t4", "--dtype", "float16"],
    "t4, second look of 8B in 4 bit": ["--base", "llama-3-8b", "--device", "t4", "--stage-kind", "second-look"],
    "a100, paged": ["--base", "smollm2-1.7b", "--device", "a100", "--optimizer", "paged_adamw8bit", "--kv", "auto"],
    "seed recipe": ["--preset", "seed", "--device", "l4", "--criterion", "cosine"],
}
# Of time, memory and machine, not of numbers; and names of folders.
NOT_COMPARED = {
    "seconds", "tokens_per_second", "mfu", "peak_rss_bytes", "base_pass_seconds", "matmul_flops_per_second", "memory",
    "base_pass_reused", "device", "sha256",
}  # fmt: skip
FOLDERS = {"out", "cache_dir", "base", "dataset", "resume", "source", "name", "run"}


def machine() -> dict[str, str]:
    """Where the same bits can be asked for."""
    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(("model name", "flags"))]
    return {
        "cpu": hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def make(folder: Path, runs: dict[str, dict[str, Any]] = RUNS) -> dict[str, Any]:
    """Makes the runs in ``folder``, and what is on record of them."""
    from cascade_fast import baselines, evaluate, generate, plan, train

    torch.set_num_threads(1)
    base, data = inputs(folder)
    found: dict[str, Any] = {"runs": {}, "evaluate": {}, "generate": {}, "plan": {}}
    for name, changes in runs.items():
        out = folder / _file_name(name)
        assert train.main(flags(folder, base, data, out, changes)) == 0, name
        found["runs"][name] = of_run(out)
    for name in MODELS if runs is RUNS else ():
        out, result = str(folder / _file_name(name)), folder / "evaluated.json"
        assert evaluate.main([out, "--split", "test", "--json", str(result), "--device", "cpu"]) == 0
        found["evaluate"][name] = _compared(json.loads(result.read_text()))
        found["generate"][name] = _printed(
            lambda out=out: generate.main([out, "The value of", "A list", "--compare-base", "--device", "cpu"])
        )
    for name, asked in PLANS.items():
        found["plan"][name] = _compared(json.loads(_printed(lambda asked=asked: plan.main([*asked, "--json"]))))
    full = flags(folder, base, data, folder / "full", {"full_lrs": 1e-3})
    assert baselines.main([*full, "--only", "full"]) == 0
    found["full fine-tune"] = _compared(json.loads((folder / "full" / "full-lr0.001-2" / "results.json").read_text()))
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """What runs leave that are killed in their first stage and go on: the same as those that were not."""
    base, data = inputs(folder)
    found = {}
    for name in ("append", "second-look"):
        out = folder / f"resumed-{name}"
        asked = flags(folder, base, data, out, {**RUNS[name], "checkpoint_minutes": 1e-6, "resume": "auto"})
        command = [sys.executable, "-m", "cascade_fast.train", *asked]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while '"epoch"' not in _read(out / "metrics.jsonl") and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found[name] = of_run(out)
    return found


def inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny base and some text."""
    base, data = folder / "base", folder / "texts.jsonl"
    if not data.exists():
        torch.set_num_threads(1)
        save_tiny_base(base)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in english_texts(120, 200)))
    return base, data


def flags(folder: Path, base: Path, data: Path, out: Path, changes: dict[str, Any]) -> list[str]:
    where = {"base": base, "dataset": data, "out": out, "cache_dir": folder / "cache", "device": "cpu"}
    settings = {**SMALL, **where, **changes}
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def of_run(out: Path) -> dict[str, Any]:
    """Weights by their checksums; results, heat map and samples as they are."""
    weights = {}
    for file in sorted(out.glob("stages/*/model.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        weights[file.parent.name] = digest.hexdigest()
    samples = out / "samples.json"
    return {
        "weights": weights,
        "results": _compared(json.loads((out / "results.json").read_text())),
        "heat_map": _digest(_compared(json.loads((out / "heat_map.json").read_text()))),
        "samples": json.loads(samples.read_text())["samples"] if samples.exists() else None,
    }


def _compared(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = NOT_COMPARED | {name for name in FOLDERS if isinstance(value.get(name), str)}
        return {name: _compared(entry) for name, entry in value.items() if name not in left_out}
    return [_compared(v) for v in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _printed(run: Any) -> str:
    from cascade_fast import generate  # noqa: F401  (its console is made when it is imported)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        run()
    return out.getvalue()


def _file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _read(path: Any) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        kept = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(name)
        record = {"machine": machine(), **make(kept)}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
