"""Trains one stage on its hard tokens: batches straight from the hidden store, early stopping, keep-best, resume.

Master weights and optimizer state are float32; matrix products run in the compute dtype under autocast (float16 with
a gradient scaler). Between log lines nothing waits for the device. A batch may run in several parts whose gradients
add up.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade_fast.losses import linear_cross_entropy, token_losses
from cascade_fast.runtime.checkpoint import KEEP, Checkpoints
from cascade_fast.runtime.compute import Compute, release_memory, trim_host_memory
from cascade_fast.runtime.console import Progress, epoch_line, say
from cascade_fast.runtime.files import load_tensors, save_tensors
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import RunSettings
from cascade_fast.stages.stage import Stage
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training.optimizers import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)

EVAL_TOKENS = 2048  # tokens of a forward pass without gradients
LOG_STEPS = 50  # steps between looks at the loss, a line of the log each
# Packs of sequences differ in size, so that freed blocks seldom fit the next one: on the CPU memory nearly
# doubled within an epoch. Taking pages anew this often did not show in the time of a run (docs/log.md).
TRIM_STEPS = 10


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after what was done has been saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


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


class EpochTotals(NamedTuple):
    """Of an epoch so far, on the host. ``tokens`` are those of finite steps; ``step`` is where the totals stood."""

    loss_sum: float
    tokens: int
    not_finite: int
    step: int


@dataclass
class StageTraining:
    """What became of a stage's training; grows epoch by epoch and is saved in every checkpoint."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_val_loss: float = math.inf
    stopped: str = ""  # why training ended

    @property
    def best_val_ppl(self) -> float:
        return math.exp(min(self.best_val_loss, 700.0))


def epoch_order(n: int, *, seed: int, stage: int, epoch: int) -> Tensor:
    """The order of ``n`` units in an epoch: depends on nothing else, so that a resumed run has it too."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stage * 1_009 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


@torch.inference_mode()
def validation_loss(stage: Stage, tokens: StageTokens, compute: Compute) -> float:
    """Mean cross-entropy of the stage's logits over ``tokens``."""
    total = 0.0
    for picked in torch.arange(tokens.units).split(tokens.units_of(EVAL_TOKENS)):
        inputs, label_B = tokens.batch(picked, compute.device)
        with compute.autocast():
            _, normed_BD = stage(inputs)
        total += token_losses(normed_BD, stage.head, label_B, dtype=compute.dtype)[0].double().sum().item()
    return total / len(tokens)


class StageTrainer:
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
        self.stage, self.train, self.val, self.settings = stage.to(compute.device), train, val, settings
        self.number, self.folder, self.compute, self.device = number, folder, compute, compute.device
        self.log, self.log_size, self.deadline = log, log_size, deadline
        self.checkpoints = Checkpoints(folder)
        self.decayed_only: list[Tensor] = list(stage.decayed_only())
        without_gradient = {id(p) for p in self.decayed_only}
        self.parameters = [p for p in stage.parameters() if id(p) not in without_gradient]
        self.optimizer = build_optimizer(self.parameters, settings, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute.dtype == torch.float16)
        self.batch_units = train.units_of(settings.batch_tokens)
        self.micro_batch_units = train.units_of(
            micro_batch_tokens or settings.micro_batch_tokens or settings.batch_tokens
        )
        self.steps_per_epoch = math.ceil(train.units / self.batch_units)
        self.trims = self.device.type == "cpu" and train.batches_differ
        self.training = StageTraining()
        self.epoch, self.step = 1, 0  # the epoch being run, and its next step
        # Of the epoch so far, kept on the device: summed loss, tokens summed over, steps that were not finite.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.last_look = EpochTotals(0.0, 0, 0, 0)
        self.epoch_seconds = 0.0
        self.epoch_tokens = 0  # of the steps of this epoch so far

    def run(self) -> StageTraining:
        """Trains, or goes on from the newest checkpoint; the stage ends with its best weights.

        Raises:
            Interrupted: after saving a checkpoint.
            DamagedFile: the best weights cannot be read back.
        """
        self._resume()
        with deferred_signals() as signals:
            while not self.training.stopped:
                if self._run_epoch(signals):
                    self._end_epoch()
                if signals or not self.training.stopped:  # when it is over, the stage's record follows at once
                    self._save()
                if signals:
                    raise Interrupted(signals[0])
        if self.training.best_epoch:
            release_memory()  # of the last steps
            self.stage.load_state_dict(load_tensors(self._best(self.training.best_epoch))[0])
        return self.training

    def _run_epoch(self, signals: list[int]) -> bool:
        """Steps until the epoch, the time or the user's patience is over; whether there is an epoch to conclude."""
        order = epoch_order(self.train.units, seed=self.settings.seed, stage=self.number, epoch=self.epoch)
        batches = order.split(self.batch_units)
        self.epoch_tokens = sum(self.train.count(picked) for picked in batches[: self.step])
        started, saved = time.monotonic(), time.monotonic()
        before = self.epoch_seconds
        self.stage.train()
        name = f"stage {self.number} epoch {self.epoch}/{self.settings.epochs}"
        with Progress(name, len(self.train)) as progress:
            progress.restart(self.epoch_tokens)
            while self.step < len(batches):
                tokens = self._train_step(batches[self.step])
                self.epoch_tokens += tokens
                progress.advance(tokens)
                self.step += 1
                self.epoch_seconds = before + time.monotonic() - started
                if self.trims and self.step % TRIM_STEPS == 0:
                    trim_host_memory()
                if self.step % LOG_STEPS == 0 and not self._look():
                    return False
                if signals:
                    return False
                if self.deadline is not None and time.monotonic() > self.deadline:
                    break
                if time.monotonic() - saved > 60 * self.settings.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()
        return self._look()

    def _train_step(self, picked: Tensor) -> int:
        """One step of the optimizer on the units ``picked``; how many tokens they hold."""
        settings, lr = self.settings, self._learning_rate(self.step)
        set_learning_rate(self.optimizer, lr)
        tokens = self.train.count(picked)
        loss = torch.zeros((), device=self.device)
        for some in picked.split(self.micro_batch_units):
            inputs, label_M = self.train.batch(some, self.device)
            with self.compute.autocast():
                _, normed_MD = self.stage(inputs)
            part = linear_cross_entropy(normed_MD, self.stage.head, label_M, dtype=self.compute.dtype)
            if len(label_M) < tokens:
                part = part * (len(label_M) / tokens)
            self.scaler.scale(part).backward()
            loss += part.detach()
        finite = torch.isfinite(loss)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if settings.grad_clip > 0 or self.scaler.is_enabled():
            gradients: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            finite &= torch.isfinite(norm)
            if settings.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.grad_clip, norm)
        self.scaler.step(self.optimizer)  # float16 only: leaves a step with an infinite gradient out
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.decayed_only:  # AdamW with a zero gradient: decay and nothing else
            with torch.no_grad():
                torch._foreach_mul_(self.decayed_only, 1.0 - lr * settings.weight_decay)
        self.totals[0] += torch.where(finite, loss.double() * tokens, 0.0)
        self.totals[1] += finite * tokens
        self.totals[2] += ~finite
        return tokens

    def _learning_rate(self, step: int) -> float:
        """Of ``step`` of this epoch."""
        steps = self.steps_per_epoch
        return learning_rate(self.settings, (self.epoch - 1) * steps + step, self.settings.epochs * steps)

    def _look(self) -> bool:
        """Waits for the device, writes a line about the steps since the last look; whether training may go on.

        Float16 overflows now and then: such a step is left out, counted, and the gradients' scale is halved. Any other
        step that is not finite, or nothing but such steps since the last look, means that training has diverged.
        """
        loss_sum, tokens, not_finite = self.totals.tolist()
        now, before = EpochTotals(loss_sum, int(tokens), int(not_finite), self.step), self.last_look
        if now.step == before.step:
            return True
        if now.not_finite > before.not_finite and (not self.scaler.is_enabled() or now.tokens == before.tokens):
            self._diverged()
            return False
        self.log.write(
            "steps",
            stage=self.number,
            epoch=self.epoch,
            step=now.step,
            loss=(now.loss_sum - before.loss_sum) / (now.tokens - before.tokens),
            lr=self._learning_rate(now.step - 1),
            skipped_steps=now.not_finite,
            seconds=self.epoch_seconds,
        )
        self.last_look = now
        return True

    def _diverged(self) -> None:
        self.training.stopped = "non-finite loss"
        self.log.write("non_finite_loss", stage=self.number, epoch=self.epoch, step=self.step)

    def _end_epoch(self) -> None:
        settings, training, seen = self.settings, self.training, self.epoch_tokens
        self.stage.eval()
        if self.trims:
            trim_host_memory()
        val_loss = validation_loss(self.stage, self.val, self.compute)
        if not math.isfinite(val_loss):
            self._diverged()
            return
        record = {
            "epoch": self.epoch,
            "tokens": seen,
            "train_loss": self.last_look.loss_sum / self.last_look.tokens,
            "val_loss": val_loss,
            "val_ppl": math.exp(min(val_loss, 700.0)),
            "seconds": self.epoch_seconds,
            "tokens_per_second": seen / max(self.epoch_seconds, 1e-9),
            "skipped_steps": self.last_look.not_finite,
        }
        training.epochs.append(record)
        self.log.write("epoch", stage=self.number, **record)
        say(f"  {epoch_line(record)}")
        if val_loss < training.best_val_loss:
            training.best_val_loss, training.best_epoch = val_loss, self.epoch
            save_tensors(self._best(self.epoch), self.stage.state_dict())
        if self.step < self.steps_per_epoch:
            training.stopped = "time is up"
        elif self.epoch - training.best_epoch >= settings.patience:
            training.stopped = f"no better validation loss for {settings.patience} epoch(s)"
        elif self.epoch == settings.epochs:
            training.stopped = "all epochs done"
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.totals.zero_()
        self.last_look = EpochTotals(0.0, 0, 0, 0)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _best(self, epoch: int) -> Path:
        """The weights of an epoch that was the best so far. A checkpoint names the one it needs, so that one of an
        epoch that is about to be run again is never taken for it."""
        return self.folder / f"best-{epoch:06d}.safetensors"

    def _save(self) -> None:
        optimizer, optimizer_values = optimizer_tensors(self.optimizer)
        tensors = {f"stage.{name}": t for name, t in self.stage.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.items()}
        tensors["totals"] = self.totals
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_seconds": self.epoch_seconds,
            "last_look": list(self.last_look),
            "training": vars(self.training) | {"best_val_loss": _json_number(self.training.best_val_loss)},
            "optimizer": optimizer_values,
            "scaler": self.scaler.state_dict(),
            "metrics_size": self.log.size(),
        }
        self.checkpoints.save((self.epoch - 1) * self.steps_per_epoch + self.step, tensors, state)
        for old in sorted(self.folder.glob("best-*.safetensors"))[:-KEEP]:  # no checkpoint that is kept needs them
            old.unlink()

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
        parts: dict[str, dict[str, Tensor]] = {"stage": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = tensor
        self.stage.load_state_dict(parts["stage"])
        load_optimizer_tensors(self.optimizer, parts["optimizer"], state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.totals.copy_(tensors["totals"])
        self.last_look = EpochTotals(*state["last_look"])
        self.epoch, self.step, self.epoch_seconds = state["epoch"], state["step"], state["epoch_seconds"]
        training = state["training"]
        self.training = StageTraining(**{**training, "best_val_loss": float(training["best_val_loss"])})
        self.log.write("resume", stage=self.number, epoch=self.epoch, step=self.step)
        say(f"  resumed at epoch {self.epoch}, step {self.step}")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
