"""Trains one stage on its hard tokens, straight from the hidden store: checkpoints, resume, a log, and an end in good
order on Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_fast.runtime.checkpoint import KEEP, Checkpoints
from cascade_fast.runtime.compute import Compute, release_memory
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import load_tensors, save_tensors
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.runtime.processes import processes
from cascade_fast.settings import RunSettings
from cascade_fast.stages.stage import Stage
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training.graphs import CudaRecorder, StepGraphs
from cascade_fast.training.optimizers import load_optimizer_tensors, optimizer_tensors
from cascade_fast.training.sharding import copy_whole, is_sharded, load_whole, sharded, whole_tensors
from cascade_fast.training.trainer import EpochTotals, Trainer, TrainingHistory


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of acting at once; a second Ctrl-C is a KeyboardInterrupt."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StageTrainer(Trainer):
    """One stage's training; :meth:`run` does it all.

    Args:
        number: the stage's number, from 1.
        folder: where checkpoints and the best weights so far are kept.
        log_size: how long the log is before this stage; on resuming, what came after the checkpoint is dropped.
        deadline: ``time.monotonic()`` after which training ends with what it has, or None.
        micro_batch_tokens: how many go through the stage at once; by default as the settings say, or a whole batch.
    """

    def __init__(
        self,
        stage: Stage,
        train: StageTokens,
        val: StageTokens,
        settings: RunSettings,
        *,
        number: int,
        folder: Path,
        compute: Compute,
        log: MetricsLog,
        log_size: int,
        deadline: float | None = None,
        micro_batch_tokens: int | None = None,
    ) -> None:
        graphs, self.stage = settings.cuda_graph == "on", stage
        spread = settings.shard == "fsdp"
        module: Any = sharded(stage, compute.device, processes()) if spread else stage.to(compute.device)
        super().__init__(
            module,
            train.in_buckets() if graphs else train,
            val,
            settings,
            name=f"stage {number}",
            number=number,
            compute=compute,
            deadline=deadline,
            micro_batch_tokens=micro_batch_tokens or settings.micro_batch_tokens,
            decayed_only=module.decayed_only(),
            linears=module.linears(),
        )
        if graphs:
            self.graphs = StepGraphs(self.step_on_tensors, self.optimizer, self.device, CudaRecorder(self.device))
        self.folder, self.log, self.log_size = folder, log, log_size
        self.checkpoints = Checkpoints(folder)
        self.best_unsaved = False

    def run(self) -> TrainingHistory:
        """Trains, or goes on from the newest checkpoint; the stage ends with its best weights.

        Raises:
            Interrupted: after saving a checkpoint.
            DamagedFile: the best weights cannot be read back.
        """
        self._resume()
        with deferred_signals() as self.signals:
            self.run_epochs()
        history = self.end_with_best()
        if is_sharded(self.module):
            copy_whole(self.module, self.stage.to(self.device))
        return history

    def log_event(self, event: str, **fields: Any) -> None:
        self.log.write(event, stage=self.number, **fields)

    # --- weights and checkpoints -------------------------------------------------------------------------------------

    def save_best(self) -> None:
        """They are the weights of the checkpoint that follows, and are written from its snapshot, before it. Without
        one training is over, and the stage has them."""
        self.best_unsaved = True

    def load_best(self) -> None:
        self.these.wait()  # for the first process, which has written them
        if self.history.best_epoch:
            release_memory()  # of the last steps
            self._load(load_tensors(self._best(self.history.best_epoch))[0])

    def _load(self, tensors: dict[str, Tensor]) -> None:
        if is_sharded(self.module):
            load_whole(self.module, tensors)
        else:
            self.module.load_state_dict(tensors)

    def _best(self, epoch: int) -> Path:
        """The weights of an epoch that was the best so far. A checkpoint names the one it needs, so that one of an
        epoch that is about to be run again is never taken for it."""
        return self.folder / f"best-{epoch:06d}.safetensors"

    def save_checkpoint(self) -> None:
        """All that training goes on from: module, optimizer, scaler, totals, and where it stands. Written in the
        background; ``state`` is plain values of this moment."""
        optimizer, optimizer_values = optimizer_tensors(self.optimizer)
        tensors = {f"stage.{name}": t for name, t in self.module.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.items()}
        tensors["totals"] = self.totals
        if is_sharded(self.module):
            tensors = whole_tensors(tensors, self.these)
        if not self.these.first:
            return
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_seconds": self.epoch_seconds,
            "last_look": list(self.last_look),
            "training": self.history.to_dict(),
            "optimizer": optimizer_values,
            "scaler": self.scaler.state_dict(),
            "metrics_size": self.log.size(),
        }
        number = (self.epoch - 1) * self.steps_per_epoch + self.step
        best = self._best(self.history.best_epoch) if self.best_unsaved else None

        def write(snapshot: dict[str, Tensor]) -> None:
            if best is not None:
                save_tensors(best, _part(snapshot, "stage"))
            self.checkpoints.save(number, snapshot, state)
            for old in sorted(self.folder.glob("best-*.safetensors"))[:-KEEP]:  # no checkpoint that is kept needs them
                old.unlink()

        self.writer.write(tensors, write)
        self.best_unsaved = False

    def _check_best(self, state: dict[str, Any]) -> None:
        """Raises DamagedFile where the best weights that a checkpoint needs are not whole."""
        best_epoch = state["training"]["best_epoch"]
        if best_epoch:
            load_tensors(self._best(best_epoch))

    def _resume(self) -> None:
        found = self.checkpoints.load(self._check_best)
        self.log.truncate(self.log_size if found is None else found[1]["metrics_size"])
        if found is None:
            return
        tensors, state = found
        self._load(_part(tensors, "stage"))
        load_optimizer_tensors(self.optimizer, _part(tensors, "optimizer"), state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.totals.copy_(tensors["totals"])
        self.last_look = EpochTotals(*state["last_look"])
        self.epoch, self.step, self.epoch_seconds = state["epoch"], state["step"], state["epoch_seconds"]
        self.history = TrainingHistory.from_dict(state["training"])
        self.log_event("resume", epoch=self.epoch, step=self.step)
        say(f"  resumed at epoch {self.epoch}, step {self.step}")


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Those of a checkpoint whose names begin with ``part``, by the rest of their names."""
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
