"""Fine-tunes of a whole base: what a cascade is compared with.

A base is trained on every labelled token of its training text by the same trainer as stages, with the optimizer,
schedule, warm-up and clipping of the settings, ``batch_tokens`` in a step. Which weights are trained is for the method
to say (``full_finetune.py``, ``lora_finetune.py``). The best epoch on validation is kept, or the base where none is
better, as a cascade keeps no stage that does not help.

Shape legend: B sequences of a batch, S tokens of the longest, N tokens with a label, D hidden size, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cascade_fast.base.general_text import load_general
from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import NO_LABEL, Sequences
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.losses import perplexity
from cascade_fast.records import BaseRecord, Final, FinetuneResults, General, SplitTokens
from cascade_fast.resume import fingerprint_differences, settings_differences
from cascade_fast.runtime.compute import Compute, keep_freed_memory, peak_rss_bytes
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import clear_temporaries, is_temporary, load_tensors, save_tensors
from cascade_fast.runtime.processes import by_first, processes
from cascade_fast.runtime.run_folder import RESULTS, read_any_results, write_results
from cascade_fast.runtime.transfer import Tensors, send, send_ahead
from cascade_fast.settings import SPLITS, RunSettings
from cascade_fast.training.trainer import NON_FINITE_LOSS, Trainer, TrainingHistory, after_divergence, validation_loss

BEST = "best.safetensors"  # the trained weights so far, while training goes on


class Method(Protocol):
    """Which weights of a base are trained."""

    name: str  # in the results
    title: str  # in what is said

    def dtype(self, compute: Compute) -> torch.dtype:
        """What the base is loaded in."""

    def prepare(self, model: Any, settings: RunSettings) -> None:
        """Changes the frozen ``model``, transformers', so that what is trained of it, float32, requires gradients."""


def finetune(settings: RunSettings, method: Method) -> Path:
    """Trains the base and leaves ``results.json`` in ``settings.out``; the weights are not kept.

    A finished run with these settings is left as it is; one that was interrupted begins anew.

    Raises:
        InputError: a setting that cannot work, or ``out`` holds another run; before anything is trained or written.
    """
    started = time.monotonic()
    if settings.out is None:
        raise InputError(f"out: None; a {method.title} needs a folder")
    if settings.base_quantization != "none":
        raise InputError(f"base_quantization: {settings.base_quantization!r}; must be none for a {method.title}")
    folder = Path(settings.out)
    compute = Compute.choose(settings.device, settings.dtype)
    base = find_base(settings)
    tokenizer = base.tokenizer()
    with processes().first_before_others():
        sequences = load_sequences(settings, tokenizer)
    settings = sequences.settle(settings)
    fingerprints = {"base": base.fingerprint, "data": sequences.fingerprint()}
    if _finished(folder, method, settings, fingerprints):
        say(f"finished already: {folder}")
        return folder
    general = load_general(settings, tokenizer)
    if compute.device.type == "cpu":
        keep_freed_memory()
    say(f"{method.title}: {folder}")
    model = base.load(compute.device, method.dtype(compute))
    parameters = model.num_parameters()
    method.prepare(model, settings)
    whole = WholeModel(model)
    tokens = {split: WholeSequences(of) for split, of in sequences.splits.items()}
    if general is not None:
        tokens["general"] = WholeSequences(general)

    def losses(*names: str) -> dict[str, float]:
        """Of those that have tokens, in nats."""
        return {n: validation_loss(whole.eval(), tokens[n], compute) for n in names if n in tokens and len(tokens[n])}

    before = losses("val", "test", "general")
    trainer = Finetune(
        whole,
        tokens["train"],
        tokens["val"],
        settings,
        title=method.title,
        compute=compute,
        folder=folder,
        started=started,
    )
    history = trainer.run(before["val"])
    if history.stopped == NON_FINITE_LOSS:
        say(f"training stopped: the loss is not finite. The best before it counts. {after_divergence(compute.dtype)}")
    after = losses("test", "general")
    trained = sum(p.numel() for p in trainer.parameters)
    results = FinetuneResults(
        method=method.name,
        base=BaseRecord(
            name=base.name,
            source=base.source,
            parameters=parameters,
            layers=base.layers,
            val_ppl=perplexity(before["val"]),
        ),
        tokens=SplitTokens(**{split: len(tokens[split]) for split in SPLITS}),
        settings=settings.to_dict(),
        fingerprints=fingerprints,
        epochs=[dataclasses.replace(epoch, skipped_steps=None) for epoch in history.epochs],
        best_epoch=history.best_epoch,
        stopped=history.stopped,
        trained_parameters=None if trained == parameters else trained,
        final=Final(
            all_token_val_ppl=history.best_val_ppl,
            all_token_test_ppl=perplexity(after["test"]) if "test" in after else None,
            base_test_ppl=perplexity(before["test"]) if "test" in before else None,
            base_pass_seconds=0.0,  # it needs none
            base_pass_reused=False,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
            general=_general(settings, len(tokens["general"]), before, after) if "general" in after else None,
        ),
    )
    by_first(_write)(folder, results)
    return folder


def _write(folder: Path, results: FinetuneResults) -> None:
    (folder / BEST).unlink(missing_ok=True)
    write_results(folder, results)


def _general(settings: RunSettings, tokens: int, before: dict[str, float], after: dict[str, float]) -> General:
    """What training has done to other text, of so many ``tokens``. ``before``, ``after``: the losses."""
    base_loss, rise = before["general"], after["general"] - before["general"]
    return General(dataset=str(settings.general_text), tokens=tokens, base_loss=base_loss, rise=rise)


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
        listed, _ = self._listed(picked)
        return self._put_together(*send([listed], device))

    def batches(
        self, picks: Sequence[Tensor], device: torch.device
    ) -> Generator[tuple[tuple[Tensor, Tensor | None], Tensor], None, None]:
        """As :meth:`batch` for each of ``picks``. To a GPU a batch is sent while the one before it is in use."""
        if device.type == "cpu":
            yield from (self.batch(picked, device) for picked in picks)
        else:
            for sent, _ in send_ahead(self._listed, picks, device):
                yield self._put_together(sent)

    def _listed(self, picked: Tensor) -> tuple[Tensors, None]:
        """What :meth:`batch` gives, by name, on the CPU."""
        padded = self.sequences.padded(picked)
        label_N = padded.label_BS.flatten()
        listed = {"ids_BS": padded.input_BS, "label_N": label_N}
        if not bool(padded.labelled_BS.all()):
            index_N = (label_N != NO_LABEL).nonzero().squeeze(1)
            listed |= {"label_N": label_N[index_N], "index_N": index_N}
        return listed, None

    @staticmethod
    def _put_together(listed: Tensors) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        return (listed["ids_BS"], listed.get("index_N")), listed["label_N"]


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


class Finetune(Trainer):
    """The training of those weights of ``whole`` that require gradients, float32 and on the device. ``started``:
    ``time.monotonic()`` when the run began, from which ``max_minutes`` counts."""

    def __init__(
        self,
        whole: WholeModel,
        train: WholeSequences,
        val: WholeSequences,
        settings: RunSettings,
        *,
        title: str,
        compute: Compute,
        folder: Path,
        started: float,
    ) -> None:
        deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes
        super().__init__(whole, train, val, settings, name=title, number=0, compute=compute, deadline=deadline)
        self.best = folder / BEST

    def run(self, base_loss: float) -> TrainingHistory:
        """Trains; the model ends as it was best, the base, with ``base_loss`` on validation, included."""
        self.history.best_val_loss = base_loss
        with self.writer:  # also where training does not begin
            self.save_best()
            self.run_epochs()
        return self.end_with_best()

    def save_best(self) -> None:
        if not self.these.first:
            return
        self.writer.write(self._trained(), lambda snapshot: save_tensors(self.best, snapshot))

    def load_best(self) -> None:
        self.these.wait()  # for the first process, which has written them
        best, _ = load_tensors(self.best)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(best[name])

    def _trained(self) -> dict[str, Tensor]:
        """By their names; what is tied is there once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def _finished(folder: Path, method: Method, settings: RunSettings, fingerprints: dict[str, str]) -> bool:
    """Raises InputError where the folder holds something else."""
    if not (folder / RESULTS).exists():
        ours = folder.is_dir() and all(p.name == BEST or is_temporary(p) for p in folder.iterdir())
        if folder.exists() and not ours:
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a {method.title}")
        clear_temporaries(folder)
        return False
    found = read_any_results(folder)
    differing = settings_differences(found.settings, settings.to_dict())
    if not isinstance(found, FinetuneResults):
        differing.append("it is a cascade's")
    elif found.method != method.name:
        differing.append(f"its method is {found.method}")
    else:
        differing += fingerprint_differences(found.fingerprints or {}, fingerprints)
    if differing:
        raise InputError(f"out: {str(folder)!r}; holds another run: {'; '.join(differing)}")
    return True
