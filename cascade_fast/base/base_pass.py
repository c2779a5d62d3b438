"""The base pass: the frozen base reads every sequence once and leaves a hidden store for each split.

Per token it keeps what the stage reads (the residual stream before the final norm, or the last hidden state; for a
second look the residual stream before the layers it copies, and their keys and values), the difficulty score, a second
one of training tokens where they are chosen by another criterion and, where they are needed, the loss of the base's
logits. Logits are never all in memory, and are not computed at all for training
tokens unless the criterion needs them. Layers in between are not kept.

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.fill_store import BaseNeeds, fill_store, last_layers
from cascade_fast.base.hidden_store import HiddenStore, StoreError
from cascade_fast.base.model import BaseModel, attention_shape
from cascade_fast.base.sequences import NO_LABEL, Sequences
from cascade_fast.base.splits import SplitSequences
from cascade_fast.criteria import Criterion, Places, TokensAtExit, get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.records import routed_by, trained_by
from cascade_fast.runtime.compute import Compute, release_memory
from cascade_fast.runtime.console import Progress, say, working
from cascade_fast.runtime.files import (
    LockHeld,
    acquire_lock,
    clear_temporaries,
    file_sha256,
    load_tensors,
    locked,
    read_json,
    save_tensors,
    write_json,
)
from cascade_fast.settings import GENERAL, RunSettings

KEEP_PASSES = 4  # base passes kept in the cache folder; the oldest are removed
HEAD = "head.safetensors"
NUMBERS = ("parameters", "seconds", "all_enter")  # of a pass, beside its files
RECORD = "base_pass.json"  # written last: a folder with this file is complete
# The modules that decide what is stored, beside operators and kernels: a pass is reused by the same code only.
CODE = (
    "base/base_pass", "base/cache_name", "base/expanded_heads", "base/fill_store", "base/fused_norms",
    "base/fused_rotation", "base/hidden_store", "base/model", "base/sequences", "criteria", "losses", "selection",
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

    An interrupted pass goes on where it stopped.

    Raises:
        NonFiniteScores: a score that is NaN or infinite; names sequence and position.
    """
    passed = _stored_pass(base, sequences, settings, needs, compute, cache)
    stores = {split: _of_run(store, settings, split) for split, store in passed.stores.items()}
    return dataclasses.replace(passed, stores=stores)


def _stored_pass(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> BasePass:
    """The pass as it is in the cache folder, made if it is not there."""
    meta = _meta(base, sequences, settings, needs, compute)
    folder = pass_folder(base, sequences, settings, needs, compute, cache)
    with _locked(cache, folder.name):  # another run on the same text waits, and then finds the pass
        found = _open(folder, meta["fingerprint"], sequences.read)
        if found is not None:
            folder.touch()  # recently used: pruned last
            return found
        clear_temporaries(folder)
        passed = _read_all(base, sequences, settings, needs, compute, folder, meta)
        release_memory()  # of the base, which nobody needs any more
        numbers = {name: getattr(passed, name) for name in NUMBERS}
        write_json(folder / RECORD, {**meta, **numbers})
        _prune(cache, keep=folder.name)
    return passed


def pass_folder(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> Path:
    """Where in the cache folder the pass is, or will be."""
    return cache / "base-pass" / _meta(base, sequences, settings, needs, compute)["fingerprint"][:16]


def _lock_path(cache: Path, name: str) -> Path:
    return cache / "locks" / f"{name}.lock"


@contextlib.contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Holds the lock of a base pass; says so where it has to wait."""
    path = _lock_path(cache, name)
    try:
        lock = acquire_lock(path, timeout=0)
    except LockHeld as held:
        say(f"base pass: waiting for another run that is at it{held.hint}")
        lock = acquire_lock(path)
    try:
        yield
    finally:
        lock.release()


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


def _read_all(
    base: BaseModel,
    sequences: SplitSequences,
    settings: RunSettings,
    needs: BaseNeeds,
    compute: Compute,
    folder: Path,
    meta: dict[str, Any],
) -> BasePass:
    """Runs the base over every split, and over other text."""
    stores = {}
    with Progress("base pass", sum(of.tokens for of in sequences.read.values())) as progress:
        with working("loading the base"):
            model = base.load(compute.device, compute.dtype)
        all_enter = _all_enter(needs, sequences)
        needs = dataclasses.replace(needs, all_enter=all_enter, keys_and_values=needs.keys_and_values and not all_enter)
        for split, of in sequences.read.items():
            entry_only = all_enter and split == "train"
            choice = _stored_choice(settings) if split == "train" else None
            with_loss = not entry_only and (split != "train" or any(by.needs_logits for by in scored_by(settings)))
            of_split = dataclasses.replace(needs, all_enter=entry_only)
            stores[split] = _run_split(model, of, folder / split, settings, of_split, meta, progress, with_loss, choice)
        tensors = {"head": model.lm_head.weight, "norm": model.model.norm.weight}
        for number, layer in enumerate(last_layers(model, needs)):
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_tensors(folder / HEAD, tensors)
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


def _open(folder: Path, fingerprint: str, splits: Iterable[str]) -> BasePass | None:
    """A finished pass, every file of it checked; None if there is none, or, after a line that says why, if it is
    damaged."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD, needs=NUMBERS)
        stores = {split: HiddenStore.open(folder / split, fingerprint=fingerprint) for split in splits}
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


def _run_split(
    model: Any,
    sequences: Sequences,
    folder: Path,
    settings: RunSettings,
    needs: BaseNeeds,
    meta: dict[str, Any],
    progress: Progress,
    with_loss: bool,
    choice: Criterion | None,
) -> HiddenStore:
    """Fills the store of one split, in the narrowest dtype that holds what the base computes."""
    start = progress.done
    with contextlib.suppress(StoreError):  # done before the pass was interrupted, or still whole
        store = HiddenStore.open(folder, fingerprint=meta["fingerprint"])
        progress.restart(start + sequences.tokens)
        return store
    for store_dtype in _store_dtypes(settings, model.dtype):
        with_scores = {"with_loss": with_loss, "with_choice": choice is not None}
        store = _resume_or_create(folder, sequences, store_dtype, model.config, needs, with_scores, meta)
        progress.restart(start)
        if fill_store(model, sequences, store, needs, _stored_criterion(settings), progress, choice):
            return store.finish()
    raise AssertionError("float32 and bfloat16 hold every finite hidden state")


def _store_dtypes(settings: RunSettings, computed: torch.dtype) -> list[torch.dtype]:
    """The dtypes to try, in order; what was computed in bfloat16 loses nothing in bfloat16."""
    if settings.store_dtype == "float32":
        return [torch.float32]
    return [torch.bfloat16] if computed == torch.bfloat16 else [torch.float16, torch.float32]


def _resume_or_create(
    folder: Path,
    sequences: Sequences,
    dtype: torch.dtype,
    base_config: Any,
    needs: BaseNeeds,
    with_scores: dict[str, bool],
    meta: dict[str, Any],
) -> HiddenStore:
    """The store of an interrupted pass, or a new one."""
    try:
        store = HiddenStore.resume(folder, fingerprint=meta["fingerprint"])
        if store.hidden.dtype == dtype:
            return store
    except StoreError:
        pass  # nothing usable there: begin anew
    kv_shape = None
    if needs.keys_and_values:
        _, kv_heads, head_dim = attention_shape(base_config)
        kv_shape = (needs.last_layers, 2, kv_heads, head_dim)
    tokens = sequences.tokens if needs.context else sequences.labels
    return HiddenStore.create(
        folder, tokens, base_config.hidden_size, dtype, **with_scores, meta=meta, kv_shape=kv_shape
    )
