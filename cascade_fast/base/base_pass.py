"""The base pass: the frozen base reads every sequence once and leaves a hidden store for each split.

Per token it keeps what the stage reads (the residual stream before the final norm, or the last hidden state; for a
second look the residual stream before the layers it copies, and their keys and values), the difficulty score and, where
they are needed, the loss of the base's logits. Logits are never all in memory, and are not computed at all for training
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
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.cache_name import with_cache
from cascade_fast.base.hidden_store import HiddenStore, StoreError
from cascade_fast.base.model import BaseModel, attention_shape
from cascade_fast.base.sequences import NO_LABEL, Sequences
from cascade_fast.base.splits import SplitSequences
from cascade_fast.criteria import Criterion, Places, TokensAtExit, get_criterion
from cascade_fast.input_checks import InputError
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
from cascade_fast.selection import check_finite
from cascade_fast.settings import GENERAL, RunSettings

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
KEEP_PASSES = 4  # base passes kept in the cache folder; the oldest are removed
FLOAT16_MAX = 65504.0
SAVE_PROGRESS_SECONDS = 5.0
HEAD = "head.safetensors"
RECORD = "base_pass.json"  # written last: a folder with this file is complete
# The modules that decide what is stored, beside operators and kernels: a pass is reused by the same code only.
CODE = (
    "base/base_pass", "base/cache_name", "base/hidden_store", "base/model", "base/sequences", "criteria", "losses",
    "selection",
)  # fmt: skip


@dataclass(frozen=True)
class BaseNeeds:
    """What the base pass keeps for stages of a kind, beside scores and losses.

    Attributes:
        reads: the hidden state that the stages start from: ``residual`` (the residual stream) or ``last_hidden`` (after
            the final norm).
        last_layers: how many of the base's last layers the stages copy: their weights are kept, and the residual
            stream before them; 0: none, and the residual stream before the final norm.
        keys_and_values: whether those of these layers are kept, too.
        context: whether tokens without a label are kept, for others to attend to.
    """

    reads: str
    last_layers: int = 0
    keys_and_values: bool = False
    context: bool = False


@dataclass(frozen=True)
class BasePass:
    """What the base leaves behind. ``head_VD`` and ``norm_D`` are its output head and final norm, for the stages;
    ``layers`` are the weights of the layers that they copy, as ``layers.<n>.<name>`` with n from 0."""

    stores: dict[str, HiddenStore]
    head_VD: Tensor
    norm_D: Tensor
    layers: dict[str, Tensor]
    parameters: int
    seconds: float
    reused: bool


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
        write_json(folder / RECORD, {**meta, "parameters": passed.parameters, "seconds": passed.seconds})
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


def _stored_criterion(settings: RunSettings) -> Criterion:
    """Whose scores the pass keeps: compared runs may share one."""
    return get_criterion(settings.criterion).in_base_pass


def _of_run(store: HiddenStore, settings: RunSettings, split: str) -> HiddenStore:
    """``store`` with what the run's own scores go by, and those of its criterion if the pass keeps another's."""
    arrays, criterion = store.arrays, get_criterion(settings.criterion)
    if criterion is not criterion.in_base_pass:  # it goes by places alone: what went into the base is not kept
        places = Places(store["sequence"], store["position"], seed=settings.seed, split=split)
        score_N = criterion.score(TokensAtExit(store.hidden, store.hidden, places=places))
        arrays = {**arrays, "score": score_N.masked_fill(store["label"] == NO_LABEL, torch.nan)}
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
        for split, of in sequences.read.items():
            with_loss = split != "train" or _stored_criterion(settings).needs_logits
            stores[split] = _run_split(model, of, folder / split, settings, needs, meta, progress, with_loss)
        tensors = {"head": model.lm_head.weight, "norm": model.model.norm.weight}
        for number, layer in enumerate(_last_layers(model, needs)):
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_tensors(folder / HEAD, tensors)
        parameters = model.num_parameters()  # numel() of a 4-bit weight counts bytes, not numbers
        return _base_pass(stores, load_tensors(folder / HEAD)[0], parameters, progress.seconds(), reused=False)


def _base_pass(
    stores: dict[str, HiddenStore], tensors: dict[str, Tensor], parameters: int, seconds: float, *, reused: bool
) -> BasePass:
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    return BasePass(stores, tensors["head"], tensors["norm"], layers, parameters, seconds, reused)


def _meta(
    base: BaseModel, sequences: SplitSequences, settings: RunSettings, needs: BaseNeeds, compute: Compute
) -> dict[str, Any]:
    """Everything the stored values depend on, and its hash."""
    criterion = _stored_criterion(settings)
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
        record = read_json(folder / RECORD, needs=("parameters", "seconds"))
        stores = {split: HiddenStore.open(folder / split, fingerprint=fingerprint) for split in splits}
        tensors, _ = load_tensors(folder / HEAD)
    except InputError as error:
        say(f"base pass: {error}; what is damaged is made anew")
        (folder / RECORD).unlink()
        return None
    return _base_pass(stores, tensors, record["parameters"], record["seconds"], reused=True)


def _last_layers(model: Any, needs: BaseNeeds) -> list[Any]:
    """The base's layers that the stages copy."""
    return list(model.model.layers[len(model.model.layers) - needs.last_layers :])


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
) -> HiddenStore:
    """Fills the store of one split, in the narrowest dtype that holds what the base computes."""
    start = progress.done
    with contextlib.suppress(StoreError):  # done before the pass was interrupted, or still whole
        store = HiddenStore.open(folder, fingerprint=meta["fingerprint"])
        progress.restart(start + sequences.tokens)
        return store
    for store_dtype in _store_dtypes(settings, model.dtype):
        store = _resume_or_create(folder, sequences, store_dtype, model.config, needs, with_loss, meta)
        progress.restart(start)
        if fill_store(model, sequences, store, needs, _stored_criterion(settings), progress):
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
    with_loss: bool,
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
        folder, tokens, base_config.hidden_size, dtype, with_loss=with_loss, meta=meta, kv_shape=kv_shape
    )


@torch.inference_mode()
def fill_store(
    model: Any, sequences: Sequences, store: HiddenStore, needs: BaseNeeds, criterion: Criterion, progress: Progress
) -> bool:
    """Runs the sequences that the store does not have yet; False as soon as a hidden state does not fit its dtype."""
    from transformers import DynamicCache

    device = model.device
    residual: dict[str, Tensor] = {}
    copied = _last_layers(model, needs)
    begins = copied[0] if copied else model.model.norm
    hook = begins.register_forward_pre_hook(lambda _module, args: residual.update(hidden=args[0]))
    last_saved, rows = time.monotonic(), 0
    try:
        for some in sequences.batches(TOKENS_AT_ONCE.get(device.type, 2048)):
            padded = sequences.padded(some)
            kept = _Kept(padded.real_BS if needs.context else padded.labelled_BS, padded.labelled_BS, device)
            rows += kept.rows
            read = int(padded.real_BS.sum())
            if rows <= store.rows:  # read before the pass was interrupted
                progress.restart(progress.done + read)
                continue
            embedded_BSD = model.model.embed_tokens(padded.input_BS.to(device))
            # One without a configuration keeps every key, whatever the sliding window.
            cache = DynamicCache() if "kv" in store else None
            output = model.model(inputs_embeds=embedded_BSD, use_cache=cache is not None, **with_cache(cache))
            last_BSD = output.last_hidden_state
            wide = {"hidden": kept(residual["hidden"] if needs.reads == "residual" else last_BSD)}
            if "kv" in store:
                wide["kv"] = kept.of_rows(_keys_and_values(cache, len(copied)))
            if store.hidden.dtype == torch.float16 and any(t.abs().max() > FLOAT16_MAX for t in wide.values()):
                return False
            tokens = TokensAtExit(kept(embedded_BSD, labelled=True), kept(last_BSD, labelled=True))
            label_N = padded.label_BS.flatten()[kept.row_N]
            if "loss" in store:
                label_J = label_N[label_N != NO_LABEL].to(device)
                score_J, loss_J = criterion.score_with_losses(
                    tokens, tokens.after_ND, model.lm_head.weight, label_J, dtype=model.dtype
                )
            else:
                score_J, loss_J = criterion.score(tokens), None
            sequence_N = some.start + kept.row_N // padded.input_BS.shape[1]
            position_N = kept.row_N % padded.input_BS.shape[1]
            check_finite(score_J, *(of_N[label_N != NO_LABEL] for of_N in (sequence_N, position_N)))
            arrays = {name: tensor.to("cpu", store.hidden.dtype) for name, tensor in wide.items()}
            arrays |= {"label": label_N, "sequence": sequence_N, "position": position_N, "score": kept.spread(score_J)}
            if loss_J is not None:
                arrays["loss"] = kept.spread(loss_J)
            store.append(arrays)
            progress.advance(read)
            if time.monotonic() - last_saved > SAVE_PROGRESS_SECONDS:
                store.save_progress()
                last_saved = time.monotonic()
    finally:
        hook.remove()
    return True


class _Kept:
    """Which of a batch's ``B * S`` places are kept, and which of them have a label. All of them: nothing is gathered.

    Attributes:
        row_N: places that are kept, int64 on the CPU.
    """

    def __init__(self, kept_BS: Tensor, labelled_BS: Tensor, device: torch.device) -> None:
        self.row_N = kept_BS.flatten().nonzero().squeeze(1)
        self.labelled_N = labelled_BS.flatten()[self.row_N]
        self._all, self._all_labelled = bool(kept_BS.all()), bool(self.labelled_N.all())
        self._row_N = None if self._all else self.row_N.to(device)
        self._row_J = self._row_N if self._all_labelled else self.row_N[self.labelled_N].to(device)

    @property
    def rows(self) -> int:
        return len(self.row_N)

    def __call__(self, of_BSD: Tensor, *, labelled: bool = False) -> Tensor:
        """``(N, D)``, or of those with a label ``(J, D)``."""
        return self.of_rows(of_BSD.flatten(0, 1), labelled=labelled)

    def of_rows(self, of_BS: Tensor, *, labelled: bool = False) -> Tensor:
        index = self._row_J if labelled else self._row_N
        return of_BS if index is None else of_BS[index]

    def spread(self, of_J: Tensor) -> Tensor:
        """``(N,)`` on the CPU: NaN where there is no label."""
        if self._all_labelled:
            return of_J.cpu()
        return of_J.new_full((self.rows,), torch.nan, device="cpu").masked_scatter_(self.labelled_N, of_J.cpu())


def _keys_and_values(cache: Any, layers: int) -> Tensor:
    """``(N, L, 2, G, E)`` of the last ``layers`` layers of transformers' cache."""
    kv_L2BGSE = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers[-layers:]])
    return kv_L2BGSE.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
