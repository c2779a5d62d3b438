"""A second look with LoRA adapters against peft's LoRA: ``python -m benchmarks.lora [--dataset FILE] [--json FILE]``.

Two parts, both on SmolLM2-135M-Instruct and the compute dtype of this machine, rank 16, alpha 32, every linear layer,
all 30 layers, 512 tokens a step:

- *Steps*: peft, a second look at every token (*dense*) and one at the hard 60 % (*look*) take turns in one process.
  ``*_vs_peft_tokens_per_second`` are tokens a second over peft's, the tokens trained on counted. ``hard_cost`` is what
  the hard 60 % of some text take over what all of it takes in a dense step. ``products_share`` is the time of the bare
  matrix products of a dense step, run one after another, over the step's.
- *Runs* (left out with ``--steps-only``): whole trainings of one epoch, each a process of its own. ``epoch_ratio`` is
  base pass and training of ours over peft's training, of the same text. ``merged_test_x_base`` and
  ``lora_test_x_base`` are test perplexities over the base's, ``peak_ratio`` peak memory of ours over peft's.
- *Parts of the text* (after the runs): ours, trained anew on the first part of the same text, with the same validation.
  ``time_to_lora_quality`` is the least base pass and training of ours, on a part or on all of it, over peft's training
  on all of it, where validation ends within 0.5 % of peft's; null: nowhere.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.texts import load_sequences
from cascade_fast.runtime.compute import Compute, keep_freed_memory
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.selection import select_below
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.kind import base_needs, find_base_for_stages, get_kind
from cascade_fast.training.finetune import Finetune, WholeModel, WholeSequences
from cascade_fast.training.lora_finetune import LoraMethod
from cascade_fast.training.stage_trainer import StageTrainer
from cascade_fast.training.trainer import Trainer

RECIPE: dict[str, Any] = {
    "stage_kind": "second-look", "adapter": "lora", "layers_per_stage": 30, "num_stages": 1, "epochs": 1,
    "batch_tokens": 512, "lr": 1e-3, "general_dataset": "none",
}  # fmt: skip
QUALITY = 1.005  # validation perplexity over LoRA's that counts as the same
BLOCKS = {"train_blocks": 448, "val_blocks": 96, "test_blocks": 96}
PARTS = (0.8, 0.9)  # of the training text


# --- steps ------------------------------------------------------------------------------------------------------------


def stepper(trainer: Trainer) -> Callable[[], int]:
    """Trains one step; how many tokens it took."""
    order = torch.randperm(trainer.train.units, generator=torch.Generator().manual_seed(1))
    batches, done = order.split(trainer.batch_units), 0

    def step() -> int:
        nonlocal done
        done += 1
        return trainer.train_step(batches[done % (len(batches) - 1)])

    return step


def stage_trainer(settings: RunSettings, folder: Path, compute: Compute, part: float = 1.0) -> StageTrainer:
    """``part``: how much of the training text, from its beginning."""
    base = find_base_for_stages(settings)
    sequences = load_sequences(settings, base.tokenizer())
    text = sequences.splits["train"]
    splits = {**sequences.splits, "train": text.first(round(part * len(text)))}
    sequences = dataclasses.replace(sequences, splits=splits)
    passed = base_pass(base, sequences, settings, base_needs(settings), compute, folder / "cache")
    kind = get_kind(settings.stage_kind)
    stage = kind.new(settings, base.config, passed, None, 1)
    train = [passed.stores["train"]]
    selection = hardest_of_store(train[0], settings.hard_ratio)
    hard, val = kind.tokens(train, selection.index_K), passed.stores["val"]
    hard_val = kind.tokens([val], select_below(val["score"], selection.threshold))
    own = folder / f"{settings.hard_ratio}-{part}"
    own.mkdir()
    return StageTrainer(
        stage.train(), hard, hard_val, settings, number=1, folder=own, compute=compute,
        log=MetricsLog(own / "log.jsonl"), log_size=0,
    )  # fmt: skip


def peft_trainer(settings: RunSettings, folder: Path, compute: Compute) -> Finetune:
    base, method = find_base_for_stages(settings), LoraMethod()
    train = WholeSequences(load_sequences(settings, base.tokenizer()).splits["train"])
    model = base.load(compute.device, method.dtype(compute))
    method.prepare(model, settings)
    whole = WholeModel(model).train()
    return Finetune(whole, train, train, settings, title=method.title, compute=compute, folder=folder, started=0)


def bare_products(compute: Compute, tokens: int) -> Callable[[], None]:
    """The products of a dense step with frozen weights, forward and for the inputs' gradients; of layers and head."""
    sizes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    weights = [torch.randn(*size).to(compute.dtype) for _ in range(30) for size in sizes] + [
        torch.randn(49_152, 576).to(compute.dtype)
    ]
    inputs = {n: torch.randn(tokens, n).to(compute.dtype) for n in (192, 576, 1536, 49_152)}

    def run() -> None:
        for weight_FD in weights:
            torch.nn.functional.linear(inputs[weight_FD.shape[1]], weight_FD)
            inputs[weight_FD.shape[0]] @ weight_FD

    return run


def measure_steps(dataset: str, rounds: int) -> dict[str, Any]:
    keep_freed_memory()
    compute = Compute.choose("cpu", "auto")
    settings = make_settings({**RECIPE, "dataset": dataset, "train_blocks": 96, "val_blocks": 8, "test_blocks": 0})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ratios = {"dense": 1.0, "look": 0.6}
        trainers: dict[str, Trainer] = {
            which: stage_trainer(dataclasses.replace(settings, hard_ratio=r), folder, compute)
            for which, r in ratios.items()
        }
        trainers["peft"] = peft_trainer(settings, folder, compute)
        taken: dict[str, list[int]] = {which: [] for which in trainers}
        steps = {which: stepper(trainer) for which, trainer in trainers.items()}
        variants: dict[str, Callable[[], object]] = {
            which: (lambda which=which: taken[which].append(steps[which]())) for which in trainers
        }
        variants["products"] = bare_products(compute, 512)
        seconds = common.interleaved(variants, rounds)
    mean = {which: sum(tokens) / len(tokens) for which, tokens in taken.items()}

    def over_peft(which: str) -> float:
        return common.ratio(seconds, "peft", which, mean[which] / mean["peft"])["p50"]

    return {
        "dtype": compute.dtype_name,
        "seconds": {which: common.percentiles(values) for which, values in seconds.items()},
        "tokens": mean,
        "look_vs_peft_tokens_per_second": over_peft("look"),
        "dense_vs_peft_tokens_per_second": over_peft("dense"),
        "hard_cost": ratios["look"] * common.ratio(seconds, "look", "dense", mean["dense"] / mean["look"])["p50"],
        "products_share": common.ratio(seconds, "products", "dense", mean["dense"] / 512)["p50"],
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def run_command(module: str, out: Path, dataset: str, more: list[str]) -> None:
    recipe = [word for name, value in RECIPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sizes = [word for name, value in BLOCKS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    cache = ["--cache-dir", str(out.parent / "cache"), "--out", str(out), "--dataset", dataset, "--device", "cpu"]
    subprocess.run([sys.executable, "-m", f"cascade_fast.{module}", *recipe, *sizes, *cache, *more], check=True)


def measure_runs(dataset: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        ours, bars = Path(name) / "dense", Path(name) / "bars"
        run_command("train", ours, dataset, ["--hard-ratio", "1"])
        run_command("baselines", bars, dataset, ["--only", "lora", "--lora-ranks", "16", "--lora-lrs", "1e-3"])
        dense = json.loads((ours / "results.json").read_text())
        (lora_file,) = bars.glob("lora-*/results.json")
        lora = json.loads(lora_file.read_text())
    of_ours, of_lora, merged = dense["final"], lora["final"], dense["final"]["merged"]
    seconds = of_ours["base_pass_seconds"] + sum(stage["seconds"] for stage in dense["stages"])
    lora_seconds = sum(epoch["seconds"] for epoch in lora["epochs"])
    enough = QUALITY * of_lora["all_token_val_ppl"]
    points = [(1.0, seconds, merged["all_token_val_ppl"]), *measure_parts(dataset, of_ours["base_pass_seconds"])]
    reach = [spent for _, spent, ppl in points if ppl <= enough]
    return {
        "seconds_of_runs": {"ours": seconds, "of them base pass": of_ours["base_pass_seconds"], "peft": lora_seconds},
        "val_x_base": {
            "ours": merged["all_token_val_ppl"] / dense["base"]["val_ppl"],
            "peft": of_lora["all_token_val_ppl"] / lora["base"]["val_ppl"],
        },
        "epoch_ratio": seconds / lora_seconds,
        "parts": [
            {"part": part, "seconds": spent, "val_x_base": ppl / dense["base"]["val_ppl"]}
            for part, spent, ppl in points
        ],
        "time_to_lora_quality": min(reach) / lora_seconds if reach else None,
        "merged_test_x_base": merged["all_token_test_ppl"] / of_ours["base_test_ppl"],
        "lora_test_x_base": of_lora["all_token_test_ppl"] / of_lora["base_test_ppl"],
        "peak_ratio": of_ours["peak_rss_bytes"] / of_lora["peak_rss_bytes"],
    }


def measure_parts(dataset: str, pass_seconds: float) -> list[tuple[float, float, float]]:
    """Of each part of the text: ``(part, seconds, validation perplexity)``."""
    settings = make_settings({**RECIPE, **BLOCKS, "hard_ratio": 1.0, "dataset": dataset})
    found = []
    for part in PARTS:
        with tempfile.TemporaryDirectory() as name:
            history = stage_trainer(settings, Path(name), Compute.choose("cpu", "auto"), part).run()
            found.append((part, pass_seconds + sum(e.seconds for e in history.epochs), history.best_val_ppl))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pydoc", help="text to train on, as the trainer takes it")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="leave the whole trainings out")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    args = parser.parse_args()
    result = measure_steps(args.dataset, args.rounds)
    common.print_table(f"step, {result['dtype']}", list(result["seconds"].items()), "ms", 1e3)
    if not args.steps_only:
        result |= measure_runs(args.dataset)
    for name, value in result.items():
        if name != "seconds":
            print(f"{name}: {value}")
    result = {"environment": common.environment(), "dataset": Path(args.dataset).name, **result}
    if not args.no_record:
        print(f"\nrecorded in {common.record('lora', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
