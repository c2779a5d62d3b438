"""Several processes against one: ``python -m benchmarks.several [--dataset FILE] [--preset NAME] [--json FILE]``.

Two parts; every process has one thread (``OMP_NUM_THREADS=1``), several are started by torchrun and talk over gloo.

- *Selection* (alone with ``--select-only``): random scores in a mapped file, of which the processes select the hardest
  together. ``select_seconds_1e8`` is the median over the rounds of the slowest process's seconds, index included, for
  10^8 scores; ``one_process_seconds`` the same for ``select_hardest`` in one. ``equal_hard_set``: index and threshold
  of both are the same, bit for bit.
- *Runs* (alone with ``--runs-only``): the same training by one process and by two, each with a cache folder of its own.
  ``speedup_2`` is base pass and stages of one over those of two, as ``results.json`` has their seconds;
  ``wall_speedup_2`` is that of the whole commands, which start Python, load the base and evaluate. What follows ``--``
  goes to the trainer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from cascade_fast.runtime.compute import keep_freed_memory
from cascade_fast.runtime.processes import end_processes, start_processes
from cascade_fast.selection import select_hardest
from cascade_fast.stages.parallel_select import select_hardest_in_parts

AT_ONCE = 2**20  # scores made at once


def start(module: str, count: int, arguments: list[str]) -> None:
    """``python -m module`` in ``count`` processes of one thread each, and waits for them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, "-m", module, *arguments], env=one_thread, check=True, cwd=common.ROOT)


# --- selection --------------------------------------------------------------------------------------------------------


def write_scores(path: Path, tokens: int, seed: int = 0) -> None:
    """Float32, normal; among 10^8 of them are many that are equal."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        for first in range(0, tokens, AT_ONCE):
            scores = torch.randn(min(AT_ONCE, tokens - first), generator=generator)
            file.write(memoryview(scores.numpy()))


def mapped_scores(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.float32)


def select_together(folder: Path, hard_ratio: float, rounds: int) -> None:
    """What each of the processes does; the first one leaves ``selected.json``."""
    keep_freed_memory()  # as a run does
    these = start_processes()
    scores_N = mapped_scores(folder / "scores.bin")
    seconds, alone = [], []
    for _ in range(rounds + 1):  # the first one reads the file, and counts for nothing
        these.wait()
        started = time.perf_counter_ns()
        selection = select_hardest_in_parts(scores_N, hard_ratio, these)
        seconds.append(these.largest([time.perf_counter_ns() - started])[0] / 1e9)
    if these.first:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            expected = select_hardest(scores_N, hard_ratio)
            alone.append(time.perf_counter() - started)
        same = torch.equal(selection.index_K, expected.index_K) and selection.threshold == expected.threshold
        told = {"seconds": seconds[1:], "one_process_seconds": alone[1:], "equal": same}
        (folder / "selected.json").write_text(json.dumps(told))
    end_processes()


def measure_selection(tokens: int, hard_ratio: float, rounds: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scores(folder / "scores.bin", tokens)
        start("benchmarks.several", count, ["--worker", name, "--hard-ratio", str(hard_ratio), "--rounds", str(rounds)])
        told = json.loads((folder / "selected.json").read_text())
    return {
        "equal_hard_set": told["equal"],
        f"select_seconds_{tokens:.0e}".replace("+0", ""): statistics.median(told["seconds"]),
        "one_process_seconds": statistics.median(told["one_process_seconds"]),
        "selection": {"tokens": tokens, "hard_ratio": hard_ratio, "processes": count, "rounds": rounds},
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def measure_run(count: int, flags: list[str]) -> dict[str, Any]:
    """One training in ``count`` processes, from nothing."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        started = time.perf_counter()
        start("cascade_fast.train", count, ["--out", str(out), "--cache-dir", str(Path(name) / "cache"), *flags])
        wall = time.perf_counter() - started
        results = json.loads((out / "results.json").read_text())
    stages = results["stages"]
    return {
        "base_pass_seconds": results["final"]["base_pass_seconds"],
        "stage_seconds": [stage["seconds"] for stage in stages],
        "wall_seconds": wall,
        "peak_rss_bytes": results["final"]["peak_rss_bytes"],
        "selected": [[stage["threshold"], stage["train_hard"]] for stage in stages],
        "val_ppl": [stage["best_val_ppl"] for stage in stages],
    }


def measure_runs(flags: list[str], count: int, rounds: int) -> dict[str, Any]:
    """By turns; medians of the rounds' ratios."""
    pairs = [(measure_run(1, flags), measure_run(count, flags)) for _ in range(rounds)]

    def spent(run: dict[str, Any]) -> float:
        return float(run["base_pass_seconds"] + sum(run["stage_seconds"]))

    return {
        f"speedup_{count}": statistics.median(spent(one) / spent(several) for one, several in pairs),
        f"wall_speedup_{count}": statistics.median(one["wall_seconds"] / sev["wall_seconds"] for one, sev in pairs),
        "same_thresholds": all(one["selected"] == several["selected"] for one, several in pairs),
        "runs": [{"1": one, str(count): several} for one, several in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pydoc", help="text to train on, as the trainer takes it")
    parser.add_argument("--preset", default="second-look", help="of the trainer (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the trainings; cuda: a GPU each")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=10**8, help="scores to select from (default: %(default)s)")
    parser.add_argument("--hard-ratio", type=float, default=0.9, help="of the selection (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed selections (default: %(default)s)")
    parser.add_argument("--run-rounds", type=int, default=3, help="trainings of each (default: %(default)s)")
    parser.add_argument("--select-only", action="store_true", help="leave the trainings out")
    parser.add_argument("--runs-only", action="store_true", help="leave the selection out")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="after --: flags of the trainer")
    args = parser.parse_args()
    if args.worker is not None:
        return select_together(args.worker, args.hard_ratio, args.rounds)
    result: dict[str, Any] = {}
    if not args.runs_only:
        result |= measure_selection(args.tokens, args.hard_ratio, args.rounds, args.processes)
    if not args.select_only:
        flags = ["--device", args.device, "--dataset", args.dataset, "--preset", args.preset, *args.flags]
        result |= {"device": args.device, "flags": [Path(args.dataset).name, args.preset, *args.flags]}
        result |= measure_runs(flags, args.processes, args.run_rounds)
    for name, value in result.items():
        print(f"{name}: {value}")
    result = {"environment": {**common.environment(), "threads": 1, "processes": args.processes}, **result}
    if not args.no_record:
        print(f"\nrecorded in {common.record('several', result).relative_to(common.ROOT)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
