"""The base pass: the frozen base reads every block once and leaves a hidden store for each split.

Per token it keeps what the stage reads (the residual stream before the final norm, or the last hidden state; for a
second look the residual stream before the layers it copies, and their keys and values), the difficulty score and, where
they are needed, the loss of the base's logits. Logits are never all in memory, and are not computed at all for training
tokens unless the criterion needs them. Layers in between are not kept.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.cache_name import with_cache
from cascade_fast.base.hidden_store import HiddenStore, StoreError
from cascade_fast.base.model import BaseModel, attention_shape
from cascade_fast.base.texts import TokenBlocks
from cascade_fast.criteria import Criterion, Places, TokensAtExit, get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute, release_memory
from cascade_fast.runtime.console import Progress, say
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
from cascade_fast.settings import SPLITS, RunSettings

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
KEEP_PASSES = 4  # base passes kept in the cache folder; the oldest are removed
FLOAT16_MAX = 65504.0
SAVE_PROGRESS_SECONDS = 5.0
HEAD = "head.safetensors"
RECORD = "base_pass.json"  # written last: a folder with this file is complete
# The modules that decide what is stored, beside operators and kernels: a pass is reused by the same code only.
CODE = (
    "base/base_pass", "base/cache_name", "base/hidden_store", "base/model", "criteria", "losses", "selection",
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
    """

    reads: str
    last_layers: int = 0
    keys_and_values: bool = False


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
    base: BaseModel, blocks: TokenBlocks, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> BasePass:
    """The base pass over ``blocks``, or the one with the same fingerprint from the cache folder.

    An interrupted pass goes on where it stopped.

    Raises:
        NonFiniteScores: a score that is NaN or infinite; names block and position.
    """
    passed = _stored_pass(base, blocks, settings, needs, compute, cache)
    stores = {split: _of_run(store, settings, split) for split, store in passed.stores.items()}
    return dataclasses.replace(passed, stores=stores)


def _stored_pass(
    base: BaseModel, blocks: TokenBlocks, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> BasePass:
    """The pass as it is in the cache folder, made if it is not there."""
    meta = _meta(base, blocks, settings, needs, compute)
    folder = pass_folder(base, blocks, settings, needs, compute, cache)
    with _locked(cache, folder.name):  # another run on the same text waits, and then finds the pass
        found = _open(folder, meta["fingerprint"])
        if found is not None:
            folder.touch()  # recently used: pruned last
            return found
        clear_temporaries(folder)
        passed = _read_all(base, blocks, settings, needs, compute, folder, meta)
        release_memory()  # of the base, which nobody needs any more
        write_json(folder / RECORD, {**meta, "parameters": passed.parameters, "seconds": passed.seconds})
        _prune(cache, keep=folder.name)
    return passed


def pass_folder(
    base: BaseModel, blocks: TokenBlocks, settings: RunSettings, needs: BaseNeeds, compute: Compute, cache: Path
) -> Path:
    """Where in the cache folder the pass is, or will be."""
    return cache / "base-pass" / _meta(base, blocks, settings, needs, compute)["fingerprint"][:16]


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
        arrays = {**arrays, "score": criterion.score(TokensAtExit(store.hidden, store.hidden, places=places))}
    return HiddenStore(store.folder, arrays, {**store.meta, "seed": settings.seed, "split": split})


def _read_all(
    base: BaseModel,
    blocks: TokenBlocks,
    settings: RunSettings,
    needs: BaseNeeds,
    compute: Compute,
    folder: Path,
    meta: dict[str, Any],
) -> BasePass:
    """Runs the base over every split."""
    stores = {}
    with Progress("base pass", sum(ids.shape[0] * settings.seq_len for ids in blocks.ids.values())) as progress:
        model = base.load(compute.device, compute.dtype)
        for split in SPLITS:
            with_loss = split != "train" or _stored_criterion(settings).needs_logits
            stores[split] = _run_split(
                model, blocks.ids[split], folder / split, settings, needs, meta, progress, with_loss
            )
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
    base: BaseModel, blocks: TokenBlocks, settings: RunSettings, needs: BaseNeeds, compute: Compute
) -> dict[str, Any]:
    """Everything the stored values depend on, and its hash."""
    criterion = _stored_criterion(settings)
    meta = {
        "base": base.fingerprint,
        "blocks": blocks.fingerprint(),
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


def _open(folder: Path, fingerprint: str) -> BasePass | None:
    """A finished pass, every file of it checked; None if there is none, or, after a line that says why, if it is
    damaged."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD, needs=("parameters", "seconds"))
        stores = {split: HiddenStore.open(folder / split, fingerprint=fingerprint) for split in SPLITS}
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
    ids_BT: Tensor,
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
        progress.restart(start + ids_BT.shape[0] * settings.seq_len)
        return store
    for store_dtype in _store_dtypes(settings, model.dtype):
        store = _resume_or_create(folder, ids_BT, store_dtype, model.config, needs, with_loss, meta)
        progress.restart(start + store.rows)
        if fill_store(model, ids_BT, store, needs, _stored_criterion(settings), progress):
            return store.finish()
    raise AssertionError("float32 and bfloat16 hold every finite hidden state")


def _store_dtypes(settings: RunSettings, computed: torch.dtype) -> list[torch.dtype]:
    """The dtypes to try, in order; what was computed in bfloat16 loses nothing in bfloat16."""
    if settings.store_dtype == "float32":
        return [torch.float32]
    return [torch.bfloat16] if computed == torch.bfloat16 else [torch.float16, torch.float32]


def _resume_or_create(
    folder: Path,
    ids_BT: Tensor,
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
    tokens, hidden_size = ids_BT[:, 1:].numel(), base_config.hidden_size
    return HiddenStore.create(folder, tokens, hidden_size, dtype, with_loss=with_loss, meta=meta, kv_shape=kv_shape)


@torch.inference_mode()
def fill_store(
    model: Any, ids_BT: Tensor, store: HiddenStore, needs: BaseNeeds, criterion: Criterion, progress: Progress
) -> bool:
    """Runs the blocks that the store does not have yet; False as soon as a hidden state does not fit its dtype."""
    from transformers import DynamicCache

    seq_len = ids_BT.shape[1] - 1
    device = model.device
    at_once = max(1, TOKENS_AT_ONCE.get(device.type, 2048) // seq_len)
    residual: dict[str, Tensor] = {}
    copied = _last_layers(model, needs)
    begins = copied[0] if copied else model.model.norm
    hook = begins.register_forward_pre_hook(lambda _module, args: residual.update(hidden=args[0]))
    last_saved = time.monotonic()
    try:
        for first in range(store.rows // seq_len, ids_BT.shape[0], at_once):
            ids = ids_BT[first : first + at_once].to(device, torch.int64)
            embedded_BSD = model.model.embed_tokens(ids[:, :-1])
            # One without a configuration keeps every key, whatever the sliding window.
            cache = DynamicCache() if "kv" in store else None
            output = model.model(inputs_embeds=embedded_BSD, use_cache=cache is not None, **with_cache(cache))
            last_BSD = output.last_hidden_state
            kept = {"hidden": (residual["hidden"] if needs.reads == "residual" else last_BSD).flatten(0, 1)}
            if "kv" in store:
                kept["kv"] = _keys_and_values(cache, len(copied))
            if store.hidden.dtype == torch.float16 and any(t.abs().max() > FLOAT16_MAX for t in kept.values()):
                return False
            label_N = ids[:, 1:].flatten()
            tokens, loss_N = TokensAtExit(embedded_BSD.flatten(0, 1), last_BSD.flatten(0, 1)), None
            if "loss" in store:
                score_N, loss_N = criterion.score_with_losses(
                    tokens, tokens.after_ND, model.lm_head.weight, label_N, dtype=model.dtype
                )
            else:
                score_N = criterion.score(tokens)
            blocks = torch.arange(first, first + ids.shape[0], dtype=torch.int32)
            sequence_N = blocks.repeat_interleave(seq_len)
            position_N = torch.arange(seq_len, dtype=torch.int32).repeat(ids.shape[0])
            check_finite(score_N, sequence_N, position_N)
            arrays = {name: tensor.to("cpu", store.hidden.dtype) for name, tensor in kept.items()}
            arrays |= {"label": label_N.cpu(), "sequence": sequence_N, "position": position_N, "score": score_N.cpu()}
            if loss_N is not None:
                arrays["loss"] = loss_N.cpu()
            store.append(arrays)
            progress.advance(ids.shape[0] * seq_len)
            if time.monotonic() - last_saved > SAVE_PROGRESS_SECONDS:
                store.save_progress()
                last_saved = time.monotonic()
    finally:
        hook.remove()
    return True


def _keys_and_values(cache: Any, layers: int) -> Tensor:
    """``(N, L, 2, G, E)`` of the last ``layers`` layers of transformers' cache."""
    kv_L2BGSE = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers[-layers:]])
    return kv_L2BGSE.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
