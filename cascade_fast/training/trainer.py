"""Trains a module: steps, epochs, early stopping, the best weights kept. A stage and the full fine-tune differ in what
module and what batches they hand over, and in where weights go.

Master weights and optimizer state are float32; matrix products run in the compute dtype under autocast (float16 with
a gradient scaler). Between log lines nothing waits for the device. A batch may run in several parts whose gradients
add up.

Shape legend: M tokens of a batch or a part of one, D hidden size, V vocabulary.
"""

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade_fast.losses import linear_cross_entropy, perplexity, token_losses
from cascade_fast.records import Epoch
from cascade_fast.runtime.compute import Compute, trim_host_memory, wait_for
from cascade_fast.runtime.console import Progress, epoch_line, say
from cascade_fast.runtime.processes import processes
from cascade_fast.runtime.snapshots import SnapshotWriter
from cascade_fast.settings import RunSettings
from cascade_fast.training.batches import Batches
from cascade_fast.training.data_parallel import own_chunks, own_parts, replica, sums_with
from cascade_fast.training.graphs import StepGraphs
from cascade_fast.training.half_weights import HalfWeights
from cascade_fast.training.optimizers import build_optimizer, learning_rate, set_learning_rate
from cascade_fast.training.scaler import FoldingScaler
from cascade_fast.training.sharding import total_norm

EVAL_TOKENS = 2048  # tokens of a forward pass without gradients
LOG_STEPS = 50  # steps between looks at the loss, a line of the log each
# Packs of sequences differ in size, so that freed blocks seldom fit the next one: on the CPU memory nearly
# doubled within an epoch. Taking pages anew this often did not show in the time of a run (docs/log.md).
TRIM_STEPS = 10
NON_FINITE_LOSS = "non-finite loss"
TIME_IS_UP = "time is up"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after what was done has been saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class EpochTotals(NamedTuple):
    """Of an epoch so far, on the host. ``tokens`` are those of finite steps; ``step`` is where the totals stood."""

    loss_sum: float
    tokens: int
    not_finite: int
    step: int


@dataclass
class TrainingHistory:
    """What became of a training; grows epoch by epoch. Epoch 0 is the weights it began with."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_val_loss: float = math.inf
    stopped: str = ""  # why training ended

    @property
    def best_val_ppl(self) -> float:
        return perplexity(self.best_val_loss)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; a best loss that is infinite, as of a stage before its first epoch, as text."""
        best = self.best_val_loss
        epochs = [epoch.to_dict() for epoch in self.epochs]
        return {**vars(self), "epochs": epochs, "best_val_loss": best if math.isfinite(best) else str(best)}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "TrainingHistory":
        """What :meth:`to_dict` has given."""
        epochs = [Epoch.from_dict(epoch) for epoch in given["epochs"]]
        return cls(**{**given, "epochs": epochs, "best_val_loss": float(given["best_val_loss"])})


def after_divergence(dtype: torch.dtype) -> str:
    """What to try after a loss that was not finite, computed in ``dtype``."""
    tries = "a lower --lr, --warmup-steps 100 or --grad-clip 1"
    if dtype == torch.float16:
        return f"Try --dtype float32 (float16 overflows above 65,504), {tries}"
    return f"Try {tries}" + ("" if dtype == torch.float32 else ", or --dtype float32")


class NonFiniteLoss(RuntimeError):
    """Training of a stage diverged; the run in ``folder`` has been finished with what was good before."""

    def __init__(self, stage: int, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(
            f"training of stage {stage} stopped: the loss is not finite. The best before it is kept in {folder}. "
            f"{after_divergence(dtype)}"
        )


def epoch_order(n: int, *, seed: int, stage: int, epoch: int) -> Tensor:
    """The order of ``n`` units in an epoch: depends on nothing else, so that a resumed run has it too."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + stage * 1_009 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


@torch.inference_mode()
def validation_loss(module: Any, tokens: Batches, compute: Compute) -> float:
    """Mean cross-entropy over ``tokens``, in nats. ``module``: see :class:`Trainer`."""
    these = processes()
    own = own_chunks(tokens.chunks(EVAL_TOKENS), these, module)
    total = torch.zeros((), dtype=torch.float64, device=compute.device)
    batches = tokens.batches([chunk for chunk, _ in own], compute.device)
    for (inputs, label_M), (_, counts) in zip(batches, own, strict=True):
        with compute.autocast():
            _, normed_MD = module(inputs)
        if counts:
            total += token_losses(normed_MD, module.head, label_M, dtype=compute.dtype)[0].double().sum()
    return these.sum_(total).item() / len(tokens)


class Trainer:
    """The training of ``module``; what is kept of it, and where, is for subclasses to say.

    Args:
        module: float32 and on the device; called with the inputs of a batch it returns hidden states and what its
            output head reads, ``(M, D)``. ``head`` is the head, ``(V, D)``.
        name: of the lines that show progress.
        number: makes the order of the batches another one; of a stage, its number.
        deadline: ``time.monotonic()`` after which training ends with what it has, or None.
        micro_batch_tokens: how many go through the module at once; by default a whole batch.
        decayed_only: parameters that never have a gradient.
        linears: layers of ``module`` that may multiply with copies of their weights: see ``half_weights.py``.
    """

    def __init__(
        self,
        module: Any,
        train: Batches,
        val: Batches,
        settings: RunSettings,
        *,
        name: str,
        number: int,
        compute: Compute,
        deadline: float | None = None,
        micro_batch_tokens: int | None = None,
        decayed_only: Iterable[Tensor] = (),
        linears: Iterable[nn.Linear] = (),
    ) -> None:
        self.module, self.train, self.val, self.settings = module, train, val, settings
        self.name, self.number, self.compute, self.device = name, number, compute, compute.device
        self.deadline, self.these = deadline, processes()
        self.decayed_only: list[Tensor] = list(decayed_only)
        without_gradient = {id(p) for p in self.decayed_only}
        # A tied one is there once; frozen ones are not.
        self.parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in without_gradient]
        self.optimizer = build_optimizer(self.parameters, settings, self.device)
        self.scaler = FoldingScaler(self.device.type, enabled=compute.dtype == torch.float16)
        # On the CPU, clipped gradients are multiplied, not divided: runs keep their bits.
        folds = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self.folds = self.device.type != "cpu" and folds and settings.shard == "none"
        self.batch_units = train.units_of(settings.batch_tokens)
        self.micro_batch_units = train.units_of(micro_batch_tokens or settings.batch_tokens)
        self.steps_per_epoch = math.ceil(train.units / self.batch_units)
        one_pass = self.micro_batch_units >= self.batch_units and not self.these.several
        self.halves = HalfWeights(linears, self.parameters, self.optimizer, compute.dtype, one_pass=one_pass)
        self.replica = replica(module, self.these, self.decayed_only)
        self.ahead: Generator[tuple[Any, Tensor], None, None] | None = None  # batches of the rest of the epoch
        self.graphs: StepGraphs | None = None  # of steps that are recorded; a batch is one part then
        self.trims = self.device.type == "cpu" and train.batches_differ
        self.writer = SnapshotWriter(self.device)
        self.history = TrainingHistory()
        self.signals: Sequence[int] = ()  # those that ask for an end, once they have come
        self.epoch, self.step = 1, 0  # the epoch being run, and its next step
        # Of the epoch so far, kept on the device: summed loss, tokens summed over, steps that were not finite.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.last_look = EpochTotals(0.0, 0, 0, 0)
        self.epoch_seconds = 0.0  # of the epoch so far, when the clock was last read
        self.epoch_started = time.monotonic()
        self.epoch_tokens = 0  # of the steps of this epoch so far
        self.recent_loss: float | None = None  # mean over the steps between the last two looks

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def log_event(self, event: str, **fields: Any) -> None:
        """What has happened, for a log."""

    def save_best(self) -> None:
        """Keeps the weights, those of ``self.history.best_epoch``; at the latest with the checkpoint that follows."""
        raise NotImplementedError

    def load_best(self) -> None:
        """Brings back the weights that were kept last. Nothing is being written by then."""
        raise NotImplementedError

    def save_checkpoint(self) -> None:
        """Keeps all that training goes on from, where it can be resumed."""

    # --- epochs ------------------------------------------------------------------------------------------------------

    def run_epochs(self) -> None:
        """Trains until all epochs are done, validation gets no better, the time is up or the loss is not finite.

        Raises:
            Interrupted: a signal has come; a checkpoint has been saved.
            DiskFull: what is written in the background had no room; it shows at the next checkpoint, or at the end.
        """
        self.halves.refresh()  # of weights that were loaded
        with self.writer:
            while not (self.history.stopped or self._interrupted()):
                if self._run_epoch():
                    self._end_epoch()
                if self._interrupted() or not self.history.stopped:  # else what came of it is written at once
                    self.save_checkpoint()
        if signal_number := self._interrupted():
            raise Interrupted(signal_number)

    def end_with_best(self) -> TrainingHistory:
        """The module gets its best weights, unless it has them."""
        if self.history.best_epoch < len(self.history.epochs) or self.history.stopped == NON_FINITE_LOSS:
            self.load_best()
            self.halves.refresh()
        return self.history

    def _run_epoch(self) -> bool:
        """Steps until the epoch, the time or the user's patience is over; whether there is an epoch to conclude."""
        order = epoch_order(self.train.units, seed=self.settings.seed, stage=self.number, epoch=self.epoch)
        batches = order.split(self.batch_units)
        self.epoch_tokens = sum(self.train.count(picked) for picked in batches[: self.step])
        saved = time.monotonic()
        self.epoch_started = saved - self.epoch_seconds
        self.module.train()
        parts = [some for picked in batches[self.step :] for some, _ in self._own_parts(picked)]
        title = f"{self.name} epoch {self.epoch}/{self.settings.epochs}"
        with self._ahead_of(parts), Progress(title, len(self.train)) as progress:
            progress.restart(self.epoch_tokens)
            while self.step < len(batches):
                tokens = self.train_step(batches[self.step])
                self.epoch_tokens += tokens
                progress.advance(tokens)
                self.step += 1
                if self.trims and self.step % TRIM_STEPS == 0:
                    trim_host_memory()
                if self.step % LOG_STEPS == 0:
                    if not self._look():
                        return False
                    progress.loss = self.recent_loss
                interrupted, late, due = self._agreed(time.monotonic() - saved)
                if interrupted:
                    self._read_clock()
                    return False
                if late:
                    break
                if due:
                    self._read_clock()
                    self.save_checkpoint()
                    saved = time.monotonic()
        return self._look()

    def _agreed(self, since_saved: float = 0.0) -> list[int]:
        """The signal that asks for an end, whether the time is up, and whether a checkpoint is due: the same for all
        processes."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        due = since_saved > 60 * self.settings.checkpoint_minutes
        return self.these.largest([self.signals[0] if self.signals else 0, late, due])

    def _interrupted(self) -> int:
        return self._agreed()[0]

    @contextlib.contextmanager
    def _ahead_of(self, parts: Sequence[Tensor]) -> Iterator[None]:
        """Steps take their batches, of ``parts``, from one iterator, which may work ahead."""
        self.ahead = self.train.batches(parts, self.device)
        try:
            yield
        finally:
            self.ahead.close()
            self.ahead = None

    def _own_parts(self, picked: Tensor) -> list[tuple[Tensor, bool]]:
        return own_parts(picked, self.micro_batch_units, self.these)

    def train_step(self, picked: Tensor) -> int:
        """One step of the optimizer on the units ``picked``, in an epoch the next ones; how many tokens they hold."""
        lr, tokens = self._learning_rate(self.step), self.train.count(picked)
        parts = self._own_parts(picked)
        ahead = self.ahead or self.train.batches([some for some, _ in parts], self.device)
        if self.graphs is not None:
            self.graphs.run(*next(ahead), tokens, lr)
            return tokens
        set_learning_rate(self.optimizer, lr)
        loss = torch.zeros((), device=self.device)
        coming = itertools.islice(ahead, len(parts))
        for number, ((_, counts), (inputs, label_M)) in enumerate(zip(parts, coming, strict=True), 1):
            with sums_with(self.replica, last=number == len(parts)):
                part = self._loss(inputs, label_M)
                if len(label_M) < tokens or not counts:
                    part = part * (len(label_M) * counts / tokens)
                self.scaler.scale(part).backward()
            loss += part.detach()
        self._update(self.these.sum_(loss), tokens, lr)
        return tokens

    def step_on_tensors(self, inputs: Any, label_M: Tensor, count: Tensor, lr: Tensor) -> None:
        """The same of a whole batch, of which the first ``count`` tokens count: see :class:`StepGraphs`."""
        loss = self._loss(inputs, label_M, count)
        self.scaler.scale(loss).backward()
        self._update(loss.detach(), count, lr)

    def _loss(self, inputs: Any, label_M: Tensor, count: Tensor | None = None) -> Tensor:
        with self.compute.autocast(), self.halves.in_use():
            _, normed_MD = self.replica(inputs)
        return linear_cross_entropy(normed_MD, self.module.head, label_M, dtype=self.compute.dtype, count=count)

    def _update(self, loss: Tensor, tokens: int | Tensor, lr: float | Tensor) -> None:
        """The optimizer's step with the gradients that are there, those of ``loss``, a mean; and the totals."""
        leaves = map(self.halves.leaf, self.parameters)
        gradients: list[Tensor] = [leaf.grad for leaf in leaves if leaf.grad is not None]
        norm = (self._folded_step if self.folds else self._plain_step)(gradients)
        finite = (loss if norm is None else loss + norm) < math.inf  # neither is negative; not so for NaN
        self.optimizer.zero_grad(set_to_none=True)
        if self.decayed_only:  # AdamW with a zero gradient: decay and nothing else
            with torch.no_grad():
                torch._foreach_mul_(self.decayed_only, 1.0 - lr * self.settings.weight_decay)
        loss_sum, seen, not_finite = self.totals.unbind()
        counted = torch.where(finite, loss, 0.0)  # times a count: exact, a product of float32 and a count
        if isinstance(tokens, Tensor):
            loss_sum.add_(counted.double() * tokens)
            seen.add_(finite * tokens)
        else:
            loss_sum.add_(counted, alpha=tokens)
            seen.add_(finite, alpha=tokens)
        not_finite.add_(~finite)

    def _folded_step(self, gradients: list[Tensor]) -> Tensor | None:
        return self.scaler.fold(self.optimizer, gradients, self.settings.grad_clip)

    def _plain_step(self, gradients: list[Tensor]) -> Tensor | None:
        """The same in passes of their own. The norm of ``gradients``, where it was needed."""
        norm = None
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if self.settings.grad_clip > 0 or self.scaler.is_enabled():
            norm = total_norm(gradients)
            if self.settings.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.grad_clip, norm)
        self.scaler.step(self.optimizer)  # float16 only: leaves a step with an infinite gradient out
        self.scaler.update()
        return norm

    def _learning_rate(self, step: int) -> float:
        """Of ``step`` of this epoch."""
        steps = self.steps_per_epoch
        return learning_rate(self.settings, (self.epoch - 1) * steps + step, self.settings.epochs * steps)

    def _read_clock(self) -> None:
        """Only once the device has done all steps that it was given: they are queued in a fraction of their time."""
        wait_for(self.device)
        self.epoch_seconds = time.monotonic() - self.epoch_started

    def _look(self) -> bool:
        """Waits for the device, writes a line about the steps since the last look; whether training may go on.

        Float16 overflows now and then: such a step is left out, counted, and the gradients' scale is halved. Any other
        step that is not finite, or nothing but such steps since the last look, means that training has diverged.
        """
        self._read_clock()
        loss_sum, tokens, not_finite = self.totals.tolist()
        now, before = EpochTotals(loss_sum, int(tokens), int(not_finite), self.step), self.last_look
        if now.step == before.step:
            return True
        if now.not_finite > before.not_finite and (not self.scaler.is_enabled() or now.tokens == before.tokens):
            self._diverged()
            return False
        self.recent_loss = (now.loss_sum - before.loss_sum) / (now.tokens - before.tokens)
        self.log_event(
            "steps",
            epoch=self.epoch,
            step=now.step,
            loss=self.recent_loss,
            lr=self._learning_rate(now.step - 1),
            skipped_steps=now.not_finite,
            seconds=self.epoch_seconds,
            tokens_per_second=self.epoch_tokens / max(self.epoch_seconds, 1e-9),
            peak_memory_bytes=self.compute.peak_memory_bytes(),
        )
        self.last_look = now
        return True

    def _diverged(self) -> None:
        self.history.stopped = NON_FINITE_LOSS
        self.log_event("non_finite_loss", epoch=self.epoch, step=self.step)

    def _end_epoch(self) -> None:
        settings, history, seen = self.settings, self.history, self.epoch_tokens
        self.module.eval()
        if self.trims:
            trim_host_memory()
        with self.halves.in_use():
            val_loss = validation_loss(self.module, self.val, self.compute)
        if not math.isfinite(val_loss):
            self._diverged()
            return
        epoch = Epoch(
            epoch=self.epoch,
            tokens=seen,
            train_loss=self.last_look.loss_sum / self.last_look.tokens,
            val_loss=val_loss,
            val_ppl=perplexity(val_loss),
            seconds=self.epoch_seconds,
            tokens_per_second=seen / max(self.epoch_seconds, 1e-9),
            skipped_steps=self.last_look.not_finite,
        )
        history.epochs.append(epoch)
        self.log_event("epoch", **epoch.to_dict())
        say(f"  {epoch_line(epoch)}")
        if val_loss < history.best_val_loss:
            history.best_val_loss, history.best_epoch = val_loss, self.epoch
            self.save_best()
        if self.step < self.steps_per_epoch:
            history.stopped = TIME_IS_UP
        elif self.epoch - history.best_epoch >= settings.patience:
            history.stopped = f"no better validation loss for {settings.patience} epoch(s)"
        elif self.epoch == settings.epochs:
            history.stopped = "all epochs done"
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.totals.zero_()
        self.last_look = EpochTotals(0.0, 0, 0, 0)
