"""Sequences of many lengths beside equal blocks: tokens a second of the base pass and of both kinds of stages.

``python -m benchmarks.ragged [--dataset FILE]``: the same base reads about as many tokens twice, cut into blocks of one
length, and as the data's own sequences. Pairs of measurements take turns; reported are medians and their ratio. Written
to ``benchmarks/results/ragged.jsonl``.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, record
from cascade_fast.base.base_pass import BasePass, base_pass
from cascade_fast.base.model import BaseModel, find_base
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.splits import SplitSequences, Usage
from cascade_fast.base.texts import load_sequences
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.kind import base_needs, get_kind
from cascade_fast.training.stage_trainer import StageTrainer

STEPS = 12
PRESETS = {"append": "warm", "second-look": "second-look"}


def as_blocks(sequences: Sequences, seq_len: int) -> Sequences:
    """The same tokens, one sequence after another, cut into blocks of one length."""
    count = sequences.tokens // (seq_len + 1)
    return Sequences.from_blocks(sequences.ids_M[: count * (seq_len + 1)].view(count, seq_len + 1))


def passed(base: BaseModel, sequences: Sequences, settings: RunSettings, compute: Compute, cache: Path) -> BasePass:
    small = sequences.first(4)
    splits = SplitSequences({"train": sequences, "val": small, "test": small}, "", Usage())
    return base_pass(base, splits, settings, base_needs(settings), compute, cache)


def trainer(base: BaseModel, done: BasePass, settings: RunSettings, compute: Compute, folder: Path) -> StageTrainer:
    kind, store = get_kind(settings.stage_kind), done.stores["train"]
    tokens = kind.tokens([store], hardest_of_store(store, settings.hard_ratio).index_K, None)
    return StageTrainer(
        kind.new(settings, base.config, done, None, 1),
        tokens,
        tokens,
        settings,
        number=1,
        folder=folder,
        compute=compute,
        log=MetricsLog(folder / "log"),
        log_size=0,
    )


def rates(turns: dict[str, Callable[[], int]], repeats: int) -> dict[str, Any]:
    """Tokens a second, medians of ``repeats`` turns; what a turn returns are its tokens."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repeats):
        for name, turn in turns.items():
            started = time.perf_counter()
            tokens = turn()
            found[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(of) for name, of in found.items()}
    ratios = [ragged / equal for ragged, equal in zip(found["ragged"], found["equal"], strict=True)]
    return {**medians, "ragged / equal": statistics.median(ratios)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pydoc")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args(argv)
    compute = Compute.choose("auto", "auto")
    results: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        sizes = {"train_tokens": asked.tokens, "val_tokens": 500, "test_tokens": 0}
        settings = make_settings({"preset": preset, "base": asked.base, "dataset": asked.dataset, **sizes})
        settings = dataclasses.replace(settings, kv="store") if get_kind(settings.stage_kind).attends else settings
        base = find_base(settings)
        ragged = load_sequences(settings, base.tokenizer()).splits["train"]
        texts = {"ragged": ragged, "equal": as_blocks(ragged, settings.seq_len)}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            numbers = iter(range(10**6))

            def read(of: Sequences, folder=folder, numbers=numbers, base=base, settings=settings) -> int:
                return of.tokens if passed(base, of, settings, compute, folder / str(next(numbers))) else 0

            passes = {which: (lambda of=of: read(of)) for which, of in texts.items()}
            results[f"{name}: base pass"] = rates(passes, asked.repeats)
            turns = {}
            for which, of in texts.items():
                made = trainer(
                    base, passed(base, of, settings, compute, folder / which), settings, compute, folder / which
                )
                order = torch.randperm(made.train.units, generator=torch.Generator().manual_seed(0))
                batches = order.split(made.batch_units)[:STEPS]
                made.module.train()

                def step(made=made, batches=batches) -> int:
                    return sum(made.train_step(picked) for picked in batches)

                step()  # warm
                turns[which] = step
            results[f"{name}: training"] = rates(turns, asked.repeats)
        lengths = ragged.length_B.double()
        results["lengths"] = {"sequences": len(ragged), "mean": lengths.mean().item(), "most": ragged.longest}
    for name, row in results.items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    record("ragged", {**environment(), "dataset": Path(asked.dataset).name, "tokens": asked.tokens, "results": results})


if __name__ == "__main__":
    main()
