"""The full fine-tune of a base: what a cascade is compared with.

Every weight is trained, embeddings and output head included, on every labelled token of its training text: the
same trainer as for stages, with the optimizer, schedule, warm-up and clipping of the settings, ``batch_tokens`` in a
step. The best epoch on validation is kept, or the base where none is better, as a cascade keeps no stage that does not
help.

Shape legend: B sequences of a batch, S tokens of the longest, N tokens with a label, D hidden size, V vocabulary.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import NO_LABEL, Sequences
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.losses import perplexity
from cascade_fast.records import BaseRecord, Final, FullFinetuneResults, SplitTokens
from cascade_fast.resume import fingerprint_differences, settings_differences
from cascade_fast.runtime.compute import Compute, keep_freed_memory, peak_rss_bytes
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import atomic_write, clear_temporaries, is_temporary
from cascade_fast.runtime.run_folder import RESULTS, read_any_results, write_results
from cascade_fast.settings import RunSettings
from cascade_fast.training.trainer import Trainer, TrainingHistory, validation_loss

BEST = "best.safetensors"  # the weights so far, while training goes on


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
    sequences = load_sequences(settings, base.tokenizer())
    settings = sequences.settle(settings)
    fingerprints = {"base": base.fingerprint, "data": sequences.fingerprint()}
    if _finished(folder, settings, fingerprints):
        say(f"finished already: {folder}")
        return folder
    if compute.device.type == "cpu":
        keep_freed_memory()
    say(f"full fine-tune: {folder}")
    model = base.load(compute.device, torch.float32).requires_grad_(True)
    whole = WholeModel(model)
    tokens = {split: WholeSequences(of) for split, of in sequences.splits.items()}

    def loss(split: str) -> float:
        return validation_loss(whole.eval(), tokens[split], compute)

    base_losses = {split: loss(split) for split in ("val", "test") if len(tokens[split])}
    trainer = FullFinetune(
        whole, tokens["train"], tokens["val"], settings, compute=compute, folder=folder, started=started
    )
    history = trainer.run(base_losses["val"])
    results = FullFinetuneResults(
        base=BaseRecord(
            name=base.name,
            source=base.source,
            parameters=model.num_parameters(),
            layers=base.layers,
            val_ppl=perplexity(base_losses["val"]),
        ),
        tokens=SplitTokens(**{split: len(of) for split, of in tokens.items()}),
        settings=settings.to_dict(),
        fingerprints=fingerprints,
        epochs=[dataclasses.replace(epoch, skipped_steps=None) for epoch in history.epochs],
        best_epoch=history.best_epoch,
        stopped=history.stopped,
        final=Final(
            all_token_val_ppl=history.best_val_ppl,
            all_token_test_ppl=perplexity(loss("test")) if "test" in base_losses else None,
            base_test_ppl=perplexity(base_losses["test"]) if "test" in base_losses else None,
            base_pass_seconds=0.0,  # it needs none
            base_pass_reused=False,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
        ),
    )
    (folder / BEST).unlink(missing_ok=True)
    write_results(folder, results)
    return folder


class WholeSequences:
    """Every labelled token of some sequences, in batches of whole sequences."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.batches_differ = len(sequences.length_B.unique()) > 1
        ends_B = sequences.length_B.cumsum(0)
        before_M = torch.cat([torch.zeros(1, dtype=torch.int64), sequences.labelled_N.cumsum(0)])
        self.labels_B = before_M[ends_B] - before_M[ends_B - sequences.length_B]

    def __len__(self) -> int:
        return self.sequences.labels

    @property
    def units(self) -> int:
        return len(self.sequences)

    def units_of(self, tokens: int) -> int:
        """How many sequences hold about ``tokens`` tokens; one at least."""
        return max(1, tokens * self.units // len(self))

    def chunks(self, tokens: int) -> list[Tensor]:
        return [torch.arange(self.units)[some] for some in self.sequences.batches(tokens)]

    def count(self, picked: Tensor) -> int:
        """How many labelled tokens the sequences ``picked`` hold."""
        return int(self.labels_B[picked].sum())

    def batch(self, picked: Tensor, device: torch.device) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """The ids ``(B, S)`` of the sequences ``picked``, padded on the right, which of the ``B * S`` places count
        (None: all), and their labels ``(N,)``, int64."""
        padded = self.sequences.padded(picked)
        label_BS = padded.label_BS.flatten()
        index_N = None
        if not bool(padded.labelled_BS.all()):
            index_N = (label_BS != NO_LABEL).nonzero().squeeze(1)
            label_BS, index_N = label_BS[index_N], index_N.to(device)
        return (padded.input_BS.to(device), index_N), label_BS.to(device)


class WholeModel(nn.Module):
    """A causal language model of transformers as the trainer takes modules."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> Tensor:
        """``(V, D)``."""
        return self.model.lm_head.weight

    def forward(self, inputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """What the head reads, ``(N, D)``, as hidden states too: nothing comes after it. ``inputs``: see
        :meth:`WholeSequences.batch`."""
        ids_BS, index_N = inputs
        normed_ND = self.model.model(input_ids=ids_BS, use_cache=False).last_hidden_state.flatten(0, 1)
        normed_ND = normed_ND if index_N is None else normed_ND[index_N]
        return normed_ND, normed_ND


class FullFinetune(Trainer):
    """The training of every weight of ``whole``, float32 and on the device. ``started``: ``time.monotonic()`` when the
    run began, from which ``max_minutes`` counts."""

    def __init__(
        self,
        whole: WholeModel,
        train: WholeSequences,
        val: WholeSequences,
        settings: RunSettings,
        *,
        compute: Compute,
        folder: Path,
        started: float,
    ) -> None:
        deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes
        name = "full fine-tune"
        super().__init__(whole, train, val, settings, name=name, number=0, compute=compute, deadline=deadline)
        self.best = folder / BEST

    def run(self, base_loss: float) -> TrainingHistory:
        """Trains; the model ends as it was best, the base, with ``base_loss`` on validation, included."""
        self.history.best_val_loss = base_loss
        self.save_best()
        self.run_epochs()
        return self.end_with_best()

    def save_best(self) -> None:
        atomic_write(self.best, lambda path: save_model(self.module.model, str(path)))

    def load_best(self) -> None:
        load_model(self.module.model, self.best)


def _finished(folder: Path, settings: RunSettings, fingerprints: dict[str, str]) -> bool:
    """Raises InputError where the folder holds something else."""
    if not (folder / RESULTS).exists():
        ours = folder.is_dir() and all(p.name == BEST or is_temporary(p) for p in folder.iterdir())
        if folder.exists() and not ours:
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a full fine-tune")
        clear_temporaries(folder)
        return False
    found = read_any_results(folder)
    differing = settings_differences(found.settings, settings.to_dict())
    if isinstance(found, FullFinetuneResults):
        differing += fingerprint_differences(found.fingerprints or {}, fingerprints)
    else:
        differing.append("it is a cascade's")
    if differing:
        raise InputError(f"out: {str(folder)!r}; holds another run: {'; '.join(differing)}")
    return True
