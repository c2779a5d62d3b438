"""A step of a second look against one of an appended stage: ``python -m benchmarks.second_look [--json FILE]``.

Both kinds take turns in one process, on the shapes of SmolLM2-135M with random weights, hidden states, keys and values:
8 layers, blocks of 128 tokens of which 60 % are hard, batches of about 512 hard tokens, the compute dtype of this
machine. *ratio* is the time a hard token takes in a second look over that in an appended stage. *expected* is the same
ratio of FLOPs as the plan counts them (queries, keys and attention are extra): what is above it is overhead.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.workload import CPU, base_config
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.planning.counts import Shape
from cascade_fast.runtime.compute import Compute, choose_dtype, keep_freed_memory
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.stages.kind import get_kind
from cascade_fast.stages.second_look import SecondLookConfig
from cascade_fast.training.stage_trainer import StageTrainer

BLOCKS = 64


def random_store(folder: Path, settings: RunSettings, dtype: torch.dtype) -> HiddenStore:
    """Blocks of random tokens with keys and values."""
    shape = SecondLookConfig.from_base(base_config(), layers=settings.layers_per_stage)
    n, generator = BLOCKS * settings.seq_len, torch.Generator().manual_seed(0)
    store_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    store = HiddenStore.create(folder, n, 576, store_dtype, with_loss=False, meta={}, kv_shape=shape.kv_shape)
    store.append(
        {
            "hidden": torch.randn(n, 576, generator=generator),
            "kv": torch.randn(n, *shape.kv_shape, generator=generator),
            "label": torch.randint(0, 49_152, (n,), generator=generator),
            "sequence": torch.arange(BLOCKS).repeat_interleave(settings.seq_len),
            "position": torch.arange(settings.seq_len).repeat(BLOCKS),
        }
    )
    return store.finish()


def steps(settings: RunSettings, store: HiddenStore, folder: Path, dtype: torch.dtype) -> Callable[[], int]:
    """A function that trains one step and says how many hard tokens it took."""
    generator = torch.Generator().manual_seed(1)
    head_VD = (torch.randn(49_152, 576, generator=generator) * 0.02).to(dtype)
    kind = get_kind(settings.stage_kind)
    stage = kind.empty(kind.config(settings, base_config()), head_VD)
    order = torch.randperm(len(store), generator=generator)
    index_K = order[: round(settings.hard_ratio * len(store))].sort().values
    tokens = kind.tokens([store], index_K)
    folder.mkdir()
    trainer = StageTrainer(
        stage, tokens, tokens, settings, number=1, folder=folder, compute=Compute(CPU, dtype),
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip
    batches = torch.randperm(tokens.units, generator=generator).split(trainer.batch_units)
    done = 0

    def step() -> int:
        nonlocal done
        done += 1
        return trainer.train_step(batches[done % (len(batches) - 1)])

    return step


def measure(rounds: int, layers: int, seq_len: int) -> dict[str, Any]:
    keep_freed_memory()
    dtype, _ = choose_dtype(CPU, "auto")
    configs = {
        kind: make_settings({"stage_kind": kind, "layers_per_stage": layers, "seq_len": seq_len})
        for kind in ("append", "second-look")
    }
    taken: dict[str, list[int]] = {kind: [] for kind in configs}
    with tempfile.TemporaryDirectory() as name:
        store = random_store(Path(name) / "store", configs["append"], dtype)
        runs = {kind: steps(config, store, Path(name) / kind, dtype) for kind, config in configs.items()}
        variants = {kind: (lambda kind=kind: taken[kind].append(runs[kind]())) for kind in runs}
        seconds = common.interleaved(variants, rounds)
    mean = {kind: sum(tokens) / len(tokens) for kind, tokens in taken.items()}
    per_token = common.ratio(seconds, "second-look", "append", mean["append"] / mean["second-look"])
    flops = {
        kind: Shape.from_settings(c, base_config()).counts.training_flops(c.seq_len) for kind, c in configs.items()
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "seq_len": seq_len,
        "seconds": {kind: common.percentiles(values) for kind, values in seconds.items()},
        "hard_tokens": mean,
        "ratio": per_token,
        "expected": flops["second-look"] / flops["append"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of a stage (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    args = parser.parse_args()
    result = measure(args.rounds, args.layers, args.seq_len)
    common.print_table(f"step, {result['dtype']}", list(result["seconds"].items()), "ms", 1e3)
    common.print_table("second look over appended", [("time of a hard token", result["ratio"])], "times")
    print(f"  expected by FLOPs {result['expected']:.3f}: {result['ratio']['p50'] / result['expected']:.3f} times that")
    result = {"environment": common.environment(), **result}
    if not args.no_record:
        print(f"\nrecorded in {common.record('second_look', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
