"""The base pass: the frozen base reads every sequence once and leaves a hidden store for each split.

Per token it keeps what the stage reads (the residual stream before the final norm, or the last hidden state; for a
second look the residual stream before the layers it copies, and their keys and values), the difficulty score, a second
one of training tokens where they are chosen by another criterion and, where they are needed, the loss of the base's
logits. Logits are never all in memory, and are not computed at all for training tokens unless a criterion needs them.
Layers in between are not kept.

Sequences of about one length run together, padded on the right: under the base's causal mask no token sees padding, nor
another text. A token without a label has no score and no loss (both NaN); it is kept only where others attend to it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.fill_store import BaseNeeds, last_layers
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import BaseModel
from cascade_fast.base.sequences import NO_LABEL
from cascade_fast.base.shards import FOLDER as SHARDS
from cascade_fast.base.split_store import SplitStore, ranges, waiting_lock
from cascade_fast.base.splits import SplitSequences
from cascade_fast.criteria import Criterion, Places, TokensAtExit, get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.records import routed_by, trained_by
from cascade_fast.runtime.compute import Compute, release_memory
from cascade_fast.runtime.console import Progress, say, working
from cascade_fast.runtime.files import (
    LockHeld,
    clear_temporaries,
    file_sha256,
    load_tensors,
    locked,
    read_json,
    save_tensors,
    write_json,
)
from cascade_fast.runtime.processes import processes
from cascade_fast.runtime.shared_folder import check_shared
from cascade_fast.settings import GENERAL, RunSettings

KEEP_PASSES = 4  # base passes kept in the cache folder; the oldest are removed
HEAD = "head.safetensors"
NUMBERS = ("parameters", "seconds", "all_enter")  # of a pass, beside its files
RECORD = "base_pass.json"  # written last: a folder with this file is complete
# The modules that decide what is stored, beside operators and kernels: a pass is reused by the same code only.
CODE = (
    "base/base_pass", "base/cache_name", "base/expanded_heads", "base/fill_store", "base/fused_norms",
    "base/fused_rotation", "base/hidden_store", "base/model", "base/sequences", "base/shards", "base/split_store",
    "criteria", "losses", "selection",
)  # fmt: skip


@dataclass(frozen=True)
class BasePass:
    """What the base leaves behind. ``head_VD`` and ``norm_D`` are its output head and final norm, for the stages;
    ``layers`` are the weights of the layers that they copy, as ``layers.<n>.<name>`` with n from 0.
    ``all_enter``: every token enters the first stage."""

    stores: dict[str, HiddenStore]
    head_VD: Tensor
    norm_D: Tensor
    layers: dict[str, Tensor]
    parameters: int
    seconds: float
    reused: bool
    all_enter: bool = False
    lent: dict[str, Any] = field(default_factory=dict)  # what has been made of the layers, for all stages

    def to(self, device: torch.device, *, layers: bool) -> "BasePass":
        """With the head on ``device``, and norm and layers where stages use them as they are."""
        passed = dataclasses.replace(self, head_VD=self.head_VD.to(device))
        if not layers:
            return passed
        moved = {name: tensor.to(device) for name, tensor in self.layers.items()}
        return dataclasses.replace(passed, norm_D=self.norm_D.to(device), layers=moved, lent={})


def base_pass(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> BasePass:
    """The base pass over ``sequences``, or the one with the same fingerprint from the cache folder.

    An interrupted pass goes on where it stopped. Of several processes, which all call this, each reads its part.

    Raises:
        NonFiniteScores: a score that is NaN or infinite; names sequence and position.
        InputError: the processes do not see one cache folder.
    """
    check_shared(cache, "cache_dir", "--cache-dir, or by the environment variable XDG_CACHE_HOME")
    passed = _stored_pass(base, sequences, settings, needs, compute, cache)
    stores = {split: _of_run(store, settings, split) for split, store in passed.stores.items()}
    return dataclasses.replace(passed, stores=stores)


def _stored_pass(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> BasePass:
    """The pass as it is in the cache folder, made if it is not there."""
    these, meta = processes(), _meta(base, sequences, settings, needs, compute)
    fingerprint, folder = meta["fingerprint"], pass_folder(base, sequences, settings, needs, compute, cache)
    # Another run on the same text waits, and then finds the pass. The others here wait for the first one.
    with _locked(cache, folder.name) if these.first else contextlib.nullcontext():
        found = _open(folder, fingerprint, sequences.read) if these.first else None
        if these.of_first(found is not None):
            found = found or _open(folder, fingerprint, sequences.read, check=False)
            assert found is not None
            if these.first:
                folder.touch()  # recently used: pruned last
            these.wait()  # before anybody may remove it
            return found
        if these.first and not any(folder.glob(f"*/{SHARDS}")):  # jobs may be at work on shards
            clear_temporaries(folder)
        splits = _split_stores(sequences, settings, needs, compute, folder, meta)
        for split in splits.values():
            split.begin()
        passed = _read_all(base, splits, needs, compute, folder, all_enter=_all_enter(needs, sequences))
        release_memory()  # of the base, which nobody needs any more
        if these.first:
            numbers = {name: getattr(passed, name) for name in NUMBERS}
            write_json(folder / RECORD, {**meta, **numbers})
            _prune(cache, keep=folder.name)
    return passed


def make_shard(
    base: BaseModel,
    sequences: SplitSequences,
    settings: RunSettings,
    needs: BaseNeeds,
    compute: Compute,
    cache: Path,
    number: int,
    count: int,
) -> BasePass | None:
    """Shard ``number`` (from 1) of ``count`` of the base pass, as an independent job makes it; jobs for the others may
    run elsewhere and at other times. With the last one the pass is made of all; it is returned once it is there.

    Raises:
        NonFiniteScores: as :func:`base_pass`.
        InputError: jobs of another count of shards have begun.
    """
    meta = _meta(base, sequences, settings, needs, compute)
    folder = pass_folder(base, sequences, settings, needs, compute, cache)
    with _locked(cache, folder.name):
        there = (folder / RECORD).is_file()
        splits = {} if there else _split_stores(sequences, settings, needs, compute, folder, meta)
        for split in splits.values():
            split.begin(job=(number, count))
    if not there:
        with Progress("base pass", sum(split.tokens for split in splits.values())) as progress:
            with working("loading the base"):
                model = base.load(compute.device, compute.dtype)
            for split in splits.values():
                split.make_own(model, progress)
        del model
        release_memory()
        missing = sorted({n for split in splits.values() for n in split.missing()})
        say(f"base pass: shard {number} of {count} is there" + (f"; missing: {ranges(missing)}" if missing else ""))
        if missing:
            return None
    return base_pass(base, sequences, settings, needs, compute, cache)


def pass_folder(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> Path:
    """Where in the cache folder the pass is, or will be."""
    return cache / "base-pass" / _meta(base, sequences, settings, needs, compute)["fingerprint"][:16]


def _lock_path(cache: Path, name: str) -> Path:
    return cache / "locks" / f"{name}.lock"


def _locked(cache: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a base pass; says so where it has to wait."""
    return waiting_lock(_lock_path(cache, name), "base pass")


def _all_enter(needs: BaseNeeds, sequences: SplitSequences) -> bool:
    """Whether every token of every split enters the first stage: see :class:`BaseNeeds`."""
    return needs.all_enter and all(of.labels == of.tokens for of in sequences.read.values())


def _stored_criterion(settings: RunSettings) -> Criterion:
    """Whose scores the pass keeps: compared runs may share one."""
    return get_criterion(routed_by(settings)).in_base_pass


def _choice(settings: RunSettings) -> Criterion | None:
    """By which tokens are chosen to be trained on, where it is not the one by which they enter a stage."""
    same = settings.hard_ratio == 1 or trained_by(settings) == routed_by(settings)
    return None if same else get_criterion(trained_by(settings))


def _stored_choice(settings: RunSettings) -> Criterion | None:
    """Whose scores the pass keeps beside :func:`_stored_criterion`'s."""
    choice = _choice(settings)
    known = choice is None or choice is not choice.in_base_pass or choice is _stored_criterion(settings)
    return None if known else choice


def scored_by(settings: RunSettings) -> list[Criterion]:
    """By which criteria the pass scores training tokens, in the order of its arrays ``score`` and ``choice``."""
    return [criterion for criterion in (_stored_criterion(settings), _stored_choice(settings)) if criterion is not None]


def _of_run(store: HiddenStore, settings: RunSettings, split: str) -> HiddenStore:
    """``store`` with what the run's own scores go by, and those of its criteria where the pass keeps others'."""

    def scores(criterion: Criterion, kept: str) -> Tensor:
        if criterion is criterion.in_base_pass:
            return store[kept]
        # It goes by places alone: what went into the base is not kept.
        places = Places(store["sequence"], store["position"], seed=settings.seed, split=split)
        score_N = criterion.score(TokensAtExit(store.hidden, store.hidden, places=places))
        return score_N.masked_fill(store["label"] == NO_LABEL, torch.nan)

    arrays = {**store.arrays, "score": scores(get_criterion(routed_by(settings)), "score")}
    choice = _choice(settings)
    if choice is not None and split == "train":
        arrays["choice"] = scores(choice, "choice" if "choice" in store else "score")
    return HiddenStore(store.folder, arrays, {**store.meta, "seed": settings.seed, "split": split})


def _split_stores(
    sequences: SplitSequences,
    settings: RunSettings,
    needs: BaseNeeds,
    compute: Compute,
    folder: Path,
    meta: dict[str, Any],
) -> dict[str, SplitStore]:
    """What is made of every split, and of other text."""
    all_enter = _all_enter(needs, sequences)
    needs = dataclasses.replace(needs, all_enter=all_enter, keys_and_values=needs.keys_and_values and not all_enter)
    stores = {}
    for split, of in sequences.read.items():
        entry_only = all_enter and split == "train"
        criterion, choice = _stored_criterion(settings), _stored_choice(settings) if split == "train" else None
        with_loss = not entry_only and (split != "train" or any(by.needs_logits for by in scored_by(settings)))
        of_split = dataclasses.replace(needs, all_enter=entry_only)
        how = (of_split, criterion, choice, with_loss, settings.store_dtype, meta, compute.device)
        stores[split] = SplitStore(folder / split, of, *how)
    return stores


def _read_all(
    base: BaseModel, splits: dict[str, SplitStore], needs: BaseNeeds, compute: Compute, folder: Path, *, all_enter: bool
) -> BasePass:
    """Runs the base over every split, and over other text."""
    these = processes()
    with Progress("base pass", sum(split.tokens for split in splits.values())) as progress:
        with working("loading the base"):
            model = base.load(compute.device, compute.dtype)
        stores = {name: split.filled(model, progress) for name, split in splits.items()}
        tensors = {"head": model.lm_head.weight, "norm": model.model.norm.weight}
        for number, layer in enumerate(last_layers(model, needs)):
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        if these.first:
            save_tensors(folder / HEAD, tensors)
        these.wait()
        parameters = model.num_parameters()  # numel() of a 4-bit weight counts bytes, not numbers
        seconds = progress.seconds()
        return _base_pass(
            stores, load_tensors(folder / HEAD)[0], parameters, seconds, reused=False, all_enter=all_enter
        )


def _base_pass(
    stores: dict[str, HiddenStore],
    tensors: dict[str, Tensor],
    parameters: int,
    seconds: float,
    *,
    reused: bool,
    all_enter: bool,
) -> BasePass:
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    return BasePass(stores, tensors["head"], tensors["norm"], layers, parameters, seconds, reused, all_enter)


def _meta(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute
) -> dict[str, Any]:
    """Everything the stored values depend on, and its hash."""
    criterion, choice = _stored_criterion(settings), _stored_choice(settings)
    meta = {
        "base": base.fingerprint,
        "sequences": sequences.fingerprint(),
        **dataclasses.asdict(needs),
        "criterion": criterion.name,
        "store_dtype": settings.store_dtype,
        "base_quantization": settings.base_quantization,
        "dtype": str(compute.dtype),
        "device": compute.device_name,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "code": code_fingerprint(),
    }
    if criterion.code is not None:
        meta["criterion_code"] = criterion.code
    if choice is not None:
        meta["choice"] = [choice.name, choice.code]
    if sequences.general is not None:
        meta[GENERAL] = hashlib.sha256(sequences.general.digest()).hexdigest()
    return {**meta, "fingerprint": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()}


@functools.cache
def code_fingerprint() -> str:
    """SHA-256 of the code that decides what a base pass stores: modules, operators, the extension, Triton's kernels."""
    package = Path(__file__).parent.parent
    kernels = importlib.util.find_spec("cascade_kernels")
    folders = [Path(f) for f in (kernels.submodule_search_locations or [])] if kernels is not None else []
    files = [
        *(package / f"{name}.py" for name in CODE),
        *sorted((package / "ops").glob("*.py")),
        *sorted(package.glob("_C*")),
        *(file for folder in folders for file in sorted(folder.glob("*.py"))),
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _open(folder: Path, fingerprint: str, splits: Iterable[str], *, check: bool = True) -> BasePass | None:
    """A finished pass, every file of it checked; None if there is none, or, after a line that says why, if it is
    damaged. Without ``check`` its stores are not read: another process has just done so."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD, needs=NUMBERS)
        stores = {split: HiddenStore.open(folder / split, fingerprint=fingerprint, check=check) for split in splits}
        tensors, _ = load_tensors(folder / HEAD)
    except InputError as error:
        say(f"base pass: {error}; what is damaged is made anew")
        (folder / RECORD).unlink()
        return None
    return _base_pass(
        stores, tensors, record["parameters"], record["seconds"], reused=True, all_enter=record["all_enter"]
    )


def _prune(cache: Path, keep: str) -> None:
    """Removes the passes not used for longest; not one that somebody is at."""
    folder = cache / "base-pass"
    passes = sorted((p for p in folder.iterdir() if (p / RECORD).is_file()), key=lambda p: p.stat().st_mtime)
    for old in passes[:-KEEP_PASSES]:
        if old.name == keep:
            continue
        try:
            with locked(_lock_path(cache, old.name), timeout=0):
                shutil.rmtree(old, ignore_errors=True)
        except LockHeld:
            continue
