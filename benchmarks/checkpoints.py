"""How long training waits for a checkpoint: ``python -m benchmarks.checkpoints [--preset NAME] [--folder DISK]``.

The first stage of a preset on SmolLM2-135M's shapes, on the CPU. At the end of an epoch its best weights and a
checkpoint (weights and optimizer state) are written; here after some steps, in turns: before training goes on, as it is
where memory is short, and in the background. Both must leave the same bytes. A line of
``benchmarks/results/checkpoints.jsonl`` has the seconds that the loop waits, as a number of steps too, and how much
slower steps are while the file is written. The first snapshot of a stage, which takes fresh memory, stands apart.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, workload
from cascade_fast.runtime.snapshots import SnapshotWriter
from cascade_fast.training.stage_trainer import StageTrainer


class Foreground(SnapshotWriter):
    """As where there is no memory for a snapshot."""

    def has_room(self, tensors: dict[str, torch.Tensor]) -> bool:
        return False


class Background(SnapshotWriter):
    """Tells when it has written."""

    def write(self, tensors: dict[str, torch.Tensor], write: Callable[[dict[str, torch.Tensor]], object]) -> None:
        self.written = threading.Event()

        def run(snapshot: dict[str, torch.Tensor]) -> None:
            if threading.current_thread() is threading.main_thread():
                raise SystemExit("there is no memory for a snapshot: nothing to compare")
            try:
                write(snapshot)
            finally:
                self.written.set()

        super().write(tensors, run)


class Checkpointing:
    """A stage in training, and what is timed of it."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer
        self.batches = torch.randperm(trainer.train.units).split(trainer.batch_units)
        trainer.module.train()
        trainer.history.best_epoch = 1
        self.background = Background(trainer.device)
        self.writers = {"foreground": Foreground(trainer.device), "background": self.background}
        self.done = 0

    def step(self) -> float:
        """Seconds of one."""
        started = time.perf_counter()
        self.trainer.train_step(self.batches[self.done % len(self.batches)])
        self.done += 1
        return time.perf_counter() - started

    def save(self, how: str) -> float:
        """Seconds until training can go on."""
        started = time.perf_counter()
        self.trainer.writer = self.writers[how]
        self.trainer.save_best()
        self.trainer.save_checkpoint()
        return time.perf_counter() - started

    def content(self, how: str) -> list[bytes]:
        """Of the files that are left."""
        self.save(how)
        self.writers[how].wait()
        return [path.read_bytes() for path in sorted(self.trainer.folder.glob("*.safetensors"))]

    def round(self, steps: int) -> dict[str, float]:
        found = {"step": statistics.median(self.step() for _ in range(steps))}
        found["foreground"] = self.save("foreground")
        self.step()  # and whatever the disk has left to do
        started = time.perf_counter()
        found["background"] = self.save("background")
        beside = [self.step()]  # one at least
        while not self.background.written.is_set():
            beside.append(self.step())
        self.background.wait()
        found["written, with steps beside it"] = time.perf_counter() - started
        found["step while it is written"] = statistics.median(beside)
        return found


def measure(trainer: StageTrainer, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds and ratios, p20, p50 and p80 over the rounds."""
    made = Checkpointing(trainer)
    made.step()
    first = made.save("background")
    made.background.wait()
    if made.content("foreground") != made.content("background"):
        raise SystemExit("the two ways have not written the same bytes")
    found = [made.round(steps) for _ in range(rounds + 1)][1:]
    seconds = {name: [of[name] for of in found] for name in found[0]}
    return {
        "written_bytes": sum(path.stat().st_size for path in trainer.folder.glob("*.safetensors")),
        "rounds": rounds,
        "seconds": {name: common.percentiles(values) for name, values in seconds.items()},
        "first_snapshot_seconds": first,
        "foreground_in_steps": common.ratio(seconds, "foreground", "step"),
        "background_in_steps": common.ratio(seconds, "background", "step"),
        "foreground_vs_background": common.ratio(seconds, "foreground", "background"),
        "step_while_written_vs_step": common.ratio(seconds, "step while it is written", "step"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="warm")
    parser.add_argument("--layers", type=int, help="in a stage; default: the preset's")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="between two checkpoints")
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is written to; default: the system's temporary one"
    )
    parser.add_argument("--dry-run", action="store_true", help="leave no line in the results")
    asked = parser.parse_args()
    changes = {} if asked.layers is None else {"layers_per_stage": asked.layers}
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        trainer = workload.preset_trainer(asked.preset, Path(temporary), "cpu", **changes)
        measured = measure(trainer, asked.rounds, asked.steps)
    result = {**common.environment(), "preset": asked.preset, "layers": trainer.settings.layers_per_stage, **measured}
    size = f"{measured['written_bytes'] / 2**20:,.0f} MiB, {result['threads']} threads"
    common.print_table(f"training waits, {size}", list(measured["seconds"].items()), "ms", 1e3)
    ratios = ("foreground_in_steps", "background_in_steps", "foreground_vs_background", "step_while_written_vs_step")
    common.print_table("ratios", [(name.replace("_", " "), measured[name]) for name in ratios], "times")
    print(f"first snapshot: {measured['first_snapshot_seconds'] * 1e3:.1f} ms")
    if not asked.dry_run:
        print(common.record("checkpoints", result))


if __name__ == "__main__":
    main()
