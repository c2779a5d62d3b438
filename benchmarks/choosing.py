"""Does choosing tokens pay: ``python -m benchmarks.choosing [--dataset FILE] [--blocks N] [--json FILE]``.

LoRA of all layers of SmolLM2-135M-Instruct, one epoch, merged, trained on the same text in these ways:

- *all*: every token; *part*: every token of the text's first part, as many as are hard.
- *skip*, *forward*: the hard tokens, and what ``--easy-tokens`` makes of the others.
- *through*: every token goes through the stage with gradients, hard ones alone have a loss. No option of the trainer.

Perplexities are of whole validation and test, over the base's. ``--steps`` times steps instead: *skip* and *forward* at
two hard ratios, in turns with a dense step of 512 tokens; *share* is the time for some text over that of dense steps.

``--plot`` trains nothing: it draws ``docs/img/choosing.png`` of ``results/choosing.jsonl`` and of
``results/choosing_table.jsonl``, runs of which only the numbers in docs/choosing.md were kept.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn

from benchmarks import common
from benchmarks.lora import RECIPE, stepper
from cascade_fast.base.base_pass import BasePass, base_pass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.texts import load_sequences
from cascade_fast.runtime.compute import Compute, keep_freed_memory
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.kind import base_needs, find_base_for_stages
from cascade_fast.stages.second_look import KIND
from cascade_fast.stages.tokens import SequenceTokens
from cascade_fast.training.stage_trainer import StageTrainer
from cascade_fast.training.trainer import validation_loss

WAYS = ("all", "part", "skip", "forward", "through")
RECORDED = ("train_blocks", "hard_ratio", "batch_tokens", "criterion", "seed")  # of a run's settings
IMAGE = common.ROOT / "docs" / "img" / "choosing.png"
STEP_RATIOS = (0.56, 0.3)


class Selected(nn.Module):
    """A stage, of whose tokens those that a batch names come out."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.stage, self.decayed_only, self.linears = stage, stage.decayed_only, list

    @property
    def head(self) -> Tensor:
        return self.stage.head

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        pack, of_these = inputs if isinstance(inputs, tuple) else (inputs, slice(None))
        output, normed = self.stage(pack)
        return output, normed[of_these]


class Learnt:
    """Whole sequences, of whose tokens ``hard`` have a loss."""

    batches_differ = True

    def __init__(self, tokens: SequenceTokens, hard: SequenceTokens) -> None:
        self.tokens, self.hard = tokens, hard
        self.is_hard_N = torch.zeros(len(tokens.store), dtype=torch.bool).index_fill_(0, hard.index_K, True)
        self.units, self.units_of, self.count = hard.units, hard.units_of, hard.count

    def __len__(self) -> int:
        return len(self.hard)

    def batches(self, picks: Sequence[Tensor], device: torch.device) -> Generator[tuple[Any, Tensor], None, None]:
        for picked, (pack, label_K) in zip(picks, self.tokens.batches(picks, device), strict=True):
            of_these = self.is_hard_N[self.tokens.rows(picked)].nonzero().squeeze(1)
            yield (pack, of_these), label_K[of_these]


def passed_by_base(settings: RunSettings, compute: Compute, cache: Path) -> tuple[Any, BasePass]:
    base = find_base_for_stages(settings)
    sequences = load_sequences(settings, base.tokenizer())
    return base, base_pass(base, sequences, settings, base_needs(settings), compute, cache)


def trainer_of(
    way: str, settings: RunSettings, base: Any, passed: BasePass, compute: Compute, folder: Path
) -> StageTrainer:
    train = passed.stores["train"]
    without_kv = HiddenStore(train.folder, {n: t for n, t in train.arrays.items() if n != "kv"}, train.meta)
    hard, everyone = hardest_of_store(train, settings.hard_ratio).index_K, torch.arange(len(train))
    tokens: Any = {
        "all": lambda: KIND.tokens([without_kv], everyone),
        "part": lambda: KIND.tokens([without_kv], everyone[train["sequence"] < len(hard) // settings.seq_len]),
        "skip": lambda: KIND.tokens([train], hard),
        "forward": lambda: KIND.tokens([without_kv], hard, easy_too=True),
        "through": lambda: Learnt(KIND.tokens([without_kv], everyone), KIND.tokens([without_kv], hard)),
    }[way]()
    stage: Any = Selected(KIND.new(settings, base.config, passed, None, 1))
    own = folder / f"{way}-{settings.hard_ratio}"
    own.mkdir()
    return StageTrainer(
        stage.train(), tokens, all_of(passed, "val"), settings, number=1, folder=own, compute=compute,
        log=MetricsLog(own / "log.jsonl"), log_size=0,
    )  # fmt: skip


def all_of(passed: BasePass, split: str) -> SequenceTokens:
    store = passed.stores[split]
    return KIND.tokens([store], torch.arange(len(store)))


def measure_runs(settings: RunSettings, ways: Sequence[str]) -> dict[str, Any]:
    compute = Compute.choose("cpu", "auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, passed = passed_by_base(settings, compute, folder / "cache")
        losses = {s: passed.stores[s]["loss"].double().mean().item() for s in ("val", "test")}
        found = {}
        for way in ways:
            trainer = trainer_of(way, settings, base, passed, compute, folder)
            history = trainer.run()
            trainer.module.eval()
            test = validation_loss(trainer.module, all_of(passed, "test"), compute)
            found[way] = {
                "learnt_tokens": len(trainer.train),
                "val_x_base": math.exp(history.best_val_loss - losses["val"]),
                "test_x_base": math.exp(test - losses["test"]),
                "seconds": sum(epoch.seconds for epoch in history.epochs),
            }
            print(way, found[way], flush=True)
    return found


def measure_steps(settings: RunSettings, rounds: int) -> dict[str, Any]:
    compute = Compute.choose("cpu", "auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, passed = passed_by_base(settings, compute, folder / "cache")
        dense = dataclasses.replace(settings, batch_tokens=512)
        trainers = {"dense": trainer_of("all", dense, base, passed, compute, folder)}
        for ratio in STEP_RATIOS:
            hard = dataclasses.replace(settings, hard_ratio=ratio, batch_tokens=round(512 * ratio))
            for way in ("skip", "forward"):
                trainers[f"{way} {ratio}"] = trainer_of(way, hard, base, passed, compute, folder)
        taken: dict[str, list[int]] = {which: [] for which in trainers}
        steps = {which: stepper(trainer) for which, trainer in trainers.items()}
        seconds = common.interleaved({w: (lambda w=w: taken[w].append(steps[w]())) for w in trainers}, rounds)
    table = [(which, common.percentiles(values)) for which, values in seconds.items()]
    common.print_table("step", table, "ms", 1e3)
    learnt = {which: sum(tokens) / len(tokens) for which, tokens in taken.items()}
    of_text = {which: float(which.split()[-1]) if which != "dense" else 1.0 for which in trainers}
    return {
        f"share of {which}": common.ratio(seconds, which, "dense", learnt["dense"] / learnt[which] * of_text[which])[
            "p50"
        ]
        for which in trainers
        if which != "dense"
    }


# --- the plot of docs/choosing.md -------------------------------------------------------------------------------------

TEXTS = {"alpaca_en_demo.json": "Alpaca rows", "rust.json": "Rust book", "pydoc": "CPython's manual"}
WORDS = {
    "part": "all tokens",
    "all": "all tokens",
    "skip": "hard, easy ones skip",
    "forward": "hard, easy ones forward",
}
FIRST_RUNS = {"batch_tokens": 288, "criterion": "entropy"}  # of lines from before they were recorded


def runs_on_record() -> list[dict[str, Any]]:
    """A row for each run: what was asked for, the way, and what came of it."""
    lines = [json.loads(line) for line in (common.RESULTS / "choosing.jsonl").read_text().splitlines()]
    rows = [{**FIRST_RUNS, **line, "way": way, **line[way]} for line in lines for way in WAYS if way in line]
    return rows + [json.loads(line) for line in (common.RESULTS / "choosing_table.jsonl").read_text().splitlines()]


def draw(path: Path) -> None:
    """Test perplexity over the base's by learnt tokens, a panel for each text and a line for each way."""
    figure = Figure(figsize=(4 * len(TEXTS), 4.4), layout="constrained")
    rows = [row for row in runs_on_record() if row["batch_tokens"] == FIRST_RUNS["batch_tokens"]]
    ways: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        whole = row["way"] in ("all", "part")
        name = WORDS.get(row["way"], "hard ones have the loss")
        ways.setdefault((name, "" if whole else row["criterion"]), []).append(row)
    for axes, (dataset, title) in zip(figure.subplots(1, len(TEXTS)), TEXTS.items(), strict=True):
        for number, ((name, criterion), of_way) in enumerate(ways.items()):
            points = [(row["learnt_tokens"], row["test_x_base"]) for row in of_way if row["dataset"] == dataset]
            label = f"{name} ({criterion})" if criterion else name
            axes.plot(*zip(*points, strict=True) if points else ([], []), "osD^vP*X"[number % 8], color=f"C{number}",
                      label=label)  # fmt: skip
            tokens = sorted({learnt for learnt, _ in points})
            means = [statistics.mean(ppl for learnt, ppl in points if learnt == of) for of in tokens]
            axes.plot(tokens, means, color=f"C{number}")
        axes.set(title=title, xlabel="learnt tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test perplexity / the base's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=75, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pydoc", help="text to train on, as the trainer takes it")
    parser.add_argument("--blocks", type=int, default=320, help="training blocks (default: %(default)s)")
    parser.add_argument("--hard-ratio", type=float, default=0.56, help="(default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=288, help="learnt tokens a step (default: %(default)s)")
    parser.add_argument("--criterion", default="entropy", help="as the trainer's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", action="store_true", help="time steps instead of training")
    parser.add_argument("--plot", action="store_true", help="draw docs/img/choosing.png instead of training")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    if args.plot:
        draw(IMAGE)
        print(IMAGE.relative_to(common.ROOT))
        return
    keep_freed_memory()
    settings = make_settings({
        **RECIPE, "dataset": args.dataset, "train_blocks": args.blocks, "val_blocks": 96, "test_blocks": 96,
        "hard_ratio": args.hard_ratio, "batch_tokens": args.batch_tokens, "criterion": args.criterion,
        "seed": args.seed,
    })  # fmt: skip
    result = measure_steps(settings, args.rounds) if args.steps else measure_runs(settings, args.ways)
    for name, value in result.items():
        print(f"{name}: {value}")
    asked = {name: getattr(settings, name) for name in RECORDED}
    result = {"environment": common.environment(), "dataset": Path(args.dataset).name, **asked, **result}
    print(f"\nrecorded in {common.record('choosing', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
