"""The full fine-tune of a base: what a cascade is compared with.

Every weight is trained, embeddings and output head included, on every token of the cascade's training blocks: float32
master weights, products in the compute dtype under autocast, AdamW with the schedule, warm-up and clipping of the
settings, ``batch_tokens`` in a step. The best epoch on validation is kept, or the base where none is better, as a
cascade keeps no stage that does not help.

Shape legend: B blocks of a batch, S tokens of a block, N = B * S tokens, D hidden size.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_blocks
from cascade_fast.input_checks import InputError
from cascade_fast.losses import linear_cross_entropy, token_losses
from cascade_fast.runtime.compute import Compute, keep_freed_memory, peak_rss_bytes
from cascade_fast.runtime.console import Progress, epoch_line, say
from cascade_fast.runtime.files import atomic_write, clear_temporaries, is_temporary, read_json, write_json
from cascade_fast.settings import RESUME_MAY_CHANGE, RunSettings, saved_settings
from cascade_fast.training.optimizers import build_optimizer, learning_rate, set_learning_rate
from cascade_fast.training.stage_trainer import EVAL_TOKENS, epoch_order


def full_finetune(settings: RunSettings) -> Path:
    """Trains the whole base and leaves ``results.json`` in ``settings.out``; the weights are not kept.

    A finished run with these settings is left as it is; one that was interrupted begins anew.

    Raises:
        InputError: a setting that cannot work, or ``out`` holds another run; before anything is trained or written.
    """
    started = time.monotonic()
    if settings.out is None:
        raise InputError("out: None; a full fine-tune needs a folder")
    if settings.base_quantization != "none":
        raise InputError(f"base_quantization: {settings.base_quantization!r}; must be none for a full fine-tune")
    folder = Path(settings.out)
    compute = Compute.choose(settings.device, settings.dtype)
    base = find_base(settings)
    blocks = load_blocks(settings, base.tokenizer())
    settings = blocks.settle(settings)
    fingerprints = {"base": base.fingerprint, "data": blocks.fingerprint()}
    if _finished(folder, settings, fingerprints):
        say(f"finished already: {folder}")
        return folder
    if compute.device.type == "cpu":
        keep_freed_memory()
    say(f"full fine-tune: {folder}")
    model = base.load(compute.device, torch.float32).requires_grad_(True)
    trainer = FullFinetune(model, settings, compute=compute, folder=folder, started=started)
    base_losses = {split: trainer.loss(blocks.ids[split]) for split in ("val", "test") if len(blocks.ids[split])}
    trainer.train(blocks.ids["train"], blocks.ids["val"], base_losses["val"])
    final = trainer.best_loss
    results = {
        "base": {
            "name": base.name,
            "source": base.source,
            "parameters": model.num_parameters(),
            "layers": base.layers,
            "val_ppl": _perplexity(base_losses["val"]),
        },
        "tokens": {split: ids[:, 1:].numel() for split, ids in blocks.ids.items()},
        "settings": settings.to_dict(),
        "fingerprints": fingerprints,
        "epochs": trainer.epochs,
        "best_epoch": trainer.best_epoch,
        "stopped": trainer.stopped,
        "final": {
            "all_token_val_ppl": _perplexity(final),
            "all_token_test_ppl": _perplexity(trainer.loss(blocks.ids["test"])) if "test" in base_losses else None,
            "base_test_ppl": _perplexity(base_losses["test"]) if "test" in base_losses else None,
            "base_pass_seconds": 0.0,  # it needs none
            "base_pass_reused": False,
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": peak_rss_bytes(),
        },
    }
    (folder / "best.safetensors").unlink(missing_ok=True)
    write_json(folder / "results.json", results)
    return folder


class FullFinetune:
    """The training of every weight of ``model``, float32 and on ``device``."""

    def __init__(
        self,
        model: Any,
        settings: RunSettings,
        *,
        compute: Compute,
        folder: Path,
        started: float,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.compute, self.device = compute, compute.device
        self.deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes
        self.parameters = list(model.parameters())  # a tied head is one of them, once
        self.optimizer = build_optimizer(self.parameters, settings, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute.dtype == torch.float16)
        self.epochs: list[dict[str, Any]] = []
        self.best_epoch, self.best_loss = 0, math.inf
        self.stopped = ""

    def train(self, train: Tensor, val: Tensor, base_loss: float) -> None:
        """Epochs over ``train`` (blocks, S + 1) until they are over or validation gets no better; the model ends as
        it was best, the base (epoch 0, with ``base_loss``) included."""
        self.best_loss = base_loss
        self._keep_best()
        at_once = max(1, self.settings.batch_tokens // (train.shape[1] - 1))
        steps = math.ceil(len(train) / at_once)
        for epoch in range(1, self.settings.epochs + 1):
            order = epoch_order(len(train), seed=self.settings.seed, stage=0, epoch=epoch)
            started, tokens = time.monotonic(), 0
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            self.model.train()
            with Progress(f"full fine-tune epoch {epoch}/{self.settings.epochs}", train[:, 1:].numel()) as progress:
                for step, picked in enumerate(order.split(at_once)):
                    lr = learning_rate(self.settings, (epoch - 1) * steps + step, self.settings.epochs * steps)
                    loss, n = self.step(train[picked], lr), train[picked, 1:].numel()
                    total += loss.double() * n
                    tokens += n
                    progress.advance(n)
                    if self.deadline is not None and time.monotonic() > self.deadline:
                        self.stopped = "time is up"
                        break
            train_loss = total.item() / tokens  # waits for the device, before the clock is read
            self._end_epoch(epoch, train_loss, time.monotonic() - started, tokens, val)
            if self.stopped:
                break
        if self.best_epoch < len(self.epochs) or self.stopped == "non-finite loss":
            load_model(self.model, self.folder / "best.safetensors")

    def step(self, ids_BT: Tensor, lr: float) -> Tensor:
        """One step of the optimizer on blocks ``(B, S + 1)``; their mean loss."""
        set_learning_rate(self.optimizer, lr)
        normed_ND, label_N = self._forward(ids_BT)
        loss = linear_cross_entropy(normed_ND, self.model.lm_head.weight, label_N, dtype=self.compute.dtype)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def loss(self, blocks: Tensor) -> float:
        """Mean cross-entropy over every token of ``blocks`` (blocks, S + 1), in nats."""
        self.model.eval()
        total = 0.0
        for ids_BT in blocks.split(max(1, EVAL_TOKENS // (blocks.shape[1] - 1))):
            normed_ND, label_N = self._forward(ids_BT)
            losses_N, _ = token_losses(normed_ND, self.model.lm_head.weight, label_N, dtype=self.compute.dtype)
            total += losses_N.double().sum().item()
        return total / blocks[:, 1:].numel()

    def _forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads ``(N, D)``, and the labels ``(N,)``."""
        ids_BT = ids_BT.to(self.device, torch.int64)
        with self.compute.autocast():
            hidden_BSD = self.model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
        return hidden_BSD.flatten(0, 1), ids_BT[:, 1:].flatten()

    def _end_epoch(self, epoch: int, train_loss: float, seconds: float, tokens: int, val: Tensor) -> None:
        val_loss = self.loss(val)
        if not math.isfinite(train_loss) or not math.isfinite(val_loss):
            self.stopped = "non-finite loss"
            return
        record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_ppl": _perplexity(val_loss),
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }
        self.epochs.append(record)
        say(f"  {epoch_line(record)}")
        if val_loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, val_loss
            self._keep_best()
        if self.stopped:
            return
        if epoch - self.best_epoch >= self.settings.patience:
            self.stopped = f"no better validation loss for {self.settings.patience} epoch(s)"
        elif epoch == self.settings.epochs:
            self.stopped = "all epochs done"

    def _keep_best(self) -> None:
        atomic_write(self.folder / "best.safetensors", lambda path: save_model(self.model, str(path)))


def _finished(folder: Path, settings: RunSettings, fingerprints: dict[str, str]) -> bool:
    """Raises InputError where the folder holds something else."""
    found = read_json(folder / "results.json", needs=("settings",)) if (folder / "results.json").exists() else None
    if found is None:
        ours = folder.is_dir() and all(p.name == "best.safetensors" or is_temporary(p) for p in folder.iterdir())
        if folder.exists() and not ours:
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a full fine-tune")
        clear_temporaries(folder)
        return False
    now = {**settings.to_dict(), **fingerprints}
    before = {**saved_settings(found["settings"]), **found.get("fingerprints", {})}
    differing = [n for n, v in now.items() if n not in RESUME_MAY_CHANGE and before.get(n) != v]
    if differing:
        shown = "; ".join(f"{n} was {before.get(n)!r}, is {now[n]!r}" for n in differing)
        raise InputError(f"out: {str(folder)!r}; holds another run: {shown}")
    return True


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
