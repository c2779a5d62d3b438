"""How far the memory plan is from the truth: planned peak over measured peak resident set, minus one.

    python -m benchmarks.plan_error

Three sizes, each a whole run of ``python -m cascade_fast.train`` in a process of its own on the CPU, with few blocks:
SmolLM2-135M itself, and random Llamas of 360M and 1B parameters (what the weights are does not matter to memory); the
first two with a stage that looks a second time; and the preset ``second-look`` with its 16 layers and more blocks.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--device", "cpu", "--train-blocks", "16", "--val-blocks", "2", "--test-blocks", "0"]
ARGUMENTS += ["--num-stages", "1", "--epochs", "1", "--accept", "always"]
RANDOM_LLAMAS: dict[str, dict[str, Any]] = {
    "llama-360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
LAYERS = {"smollm2-135m": 8, "llama-360m": 8, "llama-1b": 2}  # in a stage: 1B with 8 would train for minutes
SECOND_LOOKS = {f"{name}, second look": name for name in ("smollm2-135m", "llama-360m")}
# An epoch long enough for memory to grow in, as packs differ in size.
PRESET = "smollm2-135m, preset second-look"


def measure(cache_dir: str | None = None) -> dict[str, float]:
    """``{configuration: planned / measured - 1}``; about four minutes on one thread."""
    with tempfile.TemporaryDirectory() as temporary:
        return {name: measure_one(name, Path(temporary), cache_dir) for name in (*LAYERS, *SECOND_LOOKS, PRESET)}


def measure_one(name: str, folder: Path, cache_dir: str | None = None) -> float:
    """``planned / measured - 1`` of one configuration of ``LAYERS``, ``SECOND_LOOKS`` or ``PRESET``. ``cache_dir``:
    where the converted SmolLM2-135M lies (default: the user's cache); the base passes go to ``folder``."""
    if name == PRESET:
        more = ["--preset", "second-look", "--train-blocks", "128", "--val-blocks", "24"]
        return _planned_over_measured(folder / "run", [*ARGUMENTS, *more, "--base", _converted_smollm2(cache_dir)])
    kind = "second-look" if name in SECOND_LOOKS else "append"
    name = SECOND_LOOKS.get(name, name)
    base = str(folder / name) if name in RANDOM_LLAMAS else _converted_smollm2(cache_dir)
    if name in RANDOM_LLAMAS:
        make = "import sys, plan_error; plan_error.save_random_llama(*sys.argv[1:])"
        _python("-c", make, name, base, _converted_smollm2(cache_dir))
    layers = ["--layers-per-stage", str(LAYERS[name]), "--stage-kind", kind]
    return _planned_over_measured(folder / f"{name}-run", [*ARGUMENTS, *layers, "--base", base])


def _planned_over_measured(run: Path, arguments: list[str]) -> float:
    cache = str(run.parent / "cache")
    _python("-m", "cascade_fast.train", *arguments, "--out", str(run), "--cache-dir", cache)
    memory = json.loads((run / "results.json").read_text())["memory"]
    return memory["planned"]["peak_bytes"] / memory["measured_peak_bytes"] - 1


def save_random_llama(name: str, folder: str, tokenizer: str) -> None:
    """A Llama of that shape with random bfloat16 weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49152, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **RANDOM_LLAMAS[name]
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(folder)


def _converted_smollm2(cache_dir: str | None) -> str:
    from cascade_fast.base.model import find_base
    from cascade_fast.settings import RunSettings

    return find_base(RunSettings(cache_dir=cache_dir)).path


def _python(*arguments: str) -> None:
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for configuration, error in measure().items():
        print(f"{configuration:<34}{error:+.1%}")
