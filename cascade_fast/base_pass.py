"""The base pass: the frozen base reads every block once and leaves a hidden store for each split.

Per token it keeps what the stage reads (the residual stream before the final norm, or the last hidden state; for a
second look the residual stream before the layers it copies, and their keys and values), the difficulty score and, where
they are needed, the loss of the base's logits. Logits are never all in memory, and are not computed at all for training
tokens unless the criterion needs them. Layers in between are not kept.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors.torch import load_file
from torch import Tensor

from cascade_fast import __version__, ops
from cascade_fast.base_model import BaseModel
from cascade_fast.cache_name import with_cache
from cascade_fast.checkpoint import save_tensors, write_json
from cascade_fast.config import RunConfig
from cascade_fast.criteria import random_scores
from cascade_fast.data import SPLITS, TokenBlocks
from cascade_fast.hardware import release_memory
from cascade_fast.hidden_store import HiddenStore, StoreError
from cascade_fast.losses import token_losses
from cascade_fast.metrics import Progress
from cascade_fast.second_look import SecondLookConfig
from cascade_fast.selection import check_finite

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
KEEP_PASSES = 4  # base passes kept in the cache folder; the oldest are removed
FLOAT16_MAX = 65504.0
SAVE_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class BasePass:
    """What the base leaves behind. ``head_VD`` and ``norm_D`` are its output head and final norm, for the stages;
    ``layers`` are the weights that a second look copies, under its own names (empty for appended stages)."""

    stores: dict[str, HiddenStore]
    head_VD: Tensor
    norm_D: Tensor
    layers: dict[str, Tensor]
    parameters: int
    seconds: float
    reused: bool


def base_pass(
    base: BaseModel, blocks: TokenBlocks, config: RunConfig, device: torch.device, dtype: torch.dtype, cache: Path
) -> BasePass:
    """The base pass over ``blocks``, or the one with the same fingerprint from the cache folder.

    An interrupted pass goes on where it stopped.

    Raises:
        NonFiniteScores: a score that is NaN or infinite; names block and position.
    """
    if config.criterion == "random":  # the pass of the entropy, with other scores: compared runs share one
        passed = base_pass(base, blocks, dataclasses.replace(config, criterion="entropy"), device, dtype, cache)
        stores = {split: _with_random_scores(store, config.seed, split) for split, store in passed.stores.items()}
        return dataclasses.replace(passed, stores=stores)
    meta = _meta(base, blocks, config, device, dtype)
    folder = cache / "base-pass" / meta["fingerprint"][:16]
    lock = cache / "locks" / f"{folder.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(lock):  # another run on the same text waits, and then finds the pass
        found = _open(folder, meta["fingerprint"])
        if found is not None:
            folder.touch()  # recently used: pruned last
            return found
        parameters, seconds = _read_all(base, blocks, config, device, dtype, folder, meta)
        release_memory()  # of the base, which nobody needs any more
        # Written last: a folder with this file is complete.
        write_json(folder / "base_pass.json", {**meta, "parameters": parameters, "seconds": seconds})
        _prune(folder.parent)
        done = _open(folder, meta["fingerprint"])
    assert done is not None
    return dataclasses.replace(done, seconds=seconds, reused=False)


def _with_random_scores(store: HiddenStore, seed: int, split: str) -> HiddenStore:
    score_N = random_scores(store["sequence"], store["position"], seed=seed, split=split)
    return HiddenStore(store.folder, {**store.arrays, "score": score_N}, {**store.meta, "seed": seed, "split": split})


def _read_all(
    base: BaseModel,
    blocks: TokenBlocks,
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    meta: dict[str, Any],
) -> tuple[int, float]:
    """Runs the base over every split; its number of parameters, and the seconds it took."""
    with Progress("base pass", sum(ids.shape[0] * config.seq_len for ids in blocks.ids.values())) as progress:
        model = base.load(device, dtype)
        for split in SPLITS:
            with_loss = split != "train" or config.criterion == "entropy"
            _run_split(model, blocks.ids[split], folder / split, config, meta, progress, with_loss)
        tensors = {"head": model.lm_head.weight, "norm": model.model.norm.weight}
        for number, layer in enumerate(_copied_layers(model, meta)):
            tensors |= {f"layers.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
        save_tensors(folder / "head.safetensors", tensors)
        return model.num_parameters(), progress.seconds()  # numel() of a 4-bit weight counts bytes, not numbers


def _meta(
    base: BaseModel, blocks: TokenBlocks, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything the stored values depend on, and its hash."""
    meta: dict[str, Any] = {
        "base": base.fingerprint,
        "blocks": blocks.fingerprint(),
        "reads": config.reads,
        "criterion": config.criterion,
        "store_dtype": config.store_dtype,
        "base_quantization": config.base_quantization,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cascade_fast": __version__,
    }
    if config.stage_kind == "second-look":
        meta["second_look_layers"] = config.layers_per_stage
        meta["kv"] = "recompute" if config.kv == "recompute" else "store"
    return {**meta, "fingerprint": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()}


def _open(folder: Path, fingerprint: str) -> BasePass | None:
    try:
        record = json.loads((folder / "base_pass.json").read_text(encoding="utf-8"))
        stores = {split: HiddenStore.open(folder / split, fingerprint=fingerprint) for split in SPLITS}
        tensors = load_file(folder / "head.safetensors")
    except (OSError, ValueError, StoreError):
        return None
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    return BasePass(
        stores, tensors["head"], tensors["norm"], layers, record["parameters"], record["seconds"], reused=True
    )


def _copied_layers(model: Any, meta: dict[str, Any]) -> list[Any]:
    """The base's layers that a second look copies; none for appended stages."""
    count = meta.get("second_look_layers", 0)
    return list(model.model.layers[len(model.model.layers) - count :])


def _prune(folder: Path) -> None:
    passes = sorted((p for p in folder.iterdir() if (p / "base_pass.json").is_file()), key=lambda p: p.stat().st_mtime)
    for old in passes[:-KEEP_PASSES]:
        shutil.rmtree(old, ignore_errors=True)


def _run_split(
    model: Any,
    ids_BT: Tensor,
    folder: Path,
    config: RunConfig,
    meta: dict[str, Any],
    progress: Progress,
    with_loss: bool,
) -> None:
    """Fills the store of one split, in the narrowest dtype that holds what the base computes."""
    start = progress.done
    for store_dtype in _store_dtypes(config, model.dtype):
        store, done = _resume_or_create(folder, ids_BT, store_dtype, model.config, with_loss, meta)
        progress.restart(start + done * config.seq_len)
        if _fill(model, ids_BT, store, done, config.criterion, progress):
            store.finish()
            (folder / "progress.json").unlink(missing_ok=True)
            return
    raise AssertionError("float32 and bfloat16 hold every finite hidden state")


def _store_dtypes(config: RunConfig, computed: torch.dtype) -> list[torch.dtype]:
    """The dtypes to try, in order; what was computed in bfloat16 loses nothing in bfloat16."""
    if config.store_dtype == "float32":
        return [torch.float32]
    return [torch.bfloat16] if computed == torch.bfloat16 else [torch.float16, torch.float32]


def _resume_or_create(
    folder: Path, ids_BT: Tensor, dtype: torch.dtype, base_config: Any, with_loss: bool, meta: dict[str, Any]
) -> tuple[HiddenStore, int]:
    """A writable store and how many of its blocks are done."""
    n_blocks, seq_len = ids_BT.shape[0], ids_BT.shape[1] - 1
    try:
        store = HiddenStore.open(folder, fingerprint=meta["fingerprint"], writable=True)
        done = json.loads((folder / "progress.json").read_text(encoding="utf-8"))["blocks"]
        if store.hidden.dtype == dtype:
            return store, done
    except (OSError, ValueError, KeyError, StoreError):
        pass  # nothing usable there: begin anew
    tokens = n_blocks * seq_len
    kv_shape = None
    if meta.get("kv") == "store":
        kv_shape = SecondLookConfig.of_base(base_config, layers=meta["second_look_layers"]).kv_shape
    hidden_size = base_config.hidden_size
    store = HiddenStore.create(folder, tokens, hidden_size, dtype, with_loss=with_loss, meta=meta, kv_shape=kv_shape)
    return store, 0


@torch.inference_mode()
def _fill(model: Any, ids_BT: Tensor, store: HiddenStore, done: int, criterion: str, progress: Progress) -> bool:
    """Runs the blocks from ``done`` on; False as soon as a hidden state does not fit the store's dtype."""
    from transformers import DynamicCache

    seq_len = ids_BT.shape[1] - 1
    device = model.device
    at_once = max(1, TOKENS_AT_ONCE.get(device.type, 2048) // seq_len)
    reads = store.meta["reads"]
    residual: dict[str, Tensor] = {}
    copied = _copied_layers(model, store.meta)
    entry = copied[0] if copied else model.model.norm
    hook = entry.register_forward_pre_hook(lambda _module, args: residual.update(hidden=args[0]))
    last_saved = time.monotonic()
    try:
        for first in range(done, ids_BT.shape[0], at_once):
            ids = ids_BT[first : first + at_once].to(device, torch.int64)
            embedded_BSD = model.model.embed_tokens(ids[:, :-1])
            # One without a configuration keeps every key, whatever the sliding window.
            cache = DynamicCache() if "kv" in store else None
            output = model.model(inputs_embeds=embedded_BSD, use_cache=cache is not None, **with_cache(cache))
            last_BSD = output.last_hidden_state
            kept = {"hidden": (residual["hidden"] if reads == "residual" else last_BSD).flatten(0, 1)}
            if "kv" in store:
                kept["kv"] = _keys_and_values(cache, len(copied))
            if store.hidden.dtype == torch.float16 and any(t.abs().max() > FLOAT16_MAX for t in kept.values()):
                return False
            label_N = ids[:, 1:].flatten()
            loss_N = entropy_N = None
            if "loss" in store:
                loss_N, entropy_N = token_losses(
                    last_BSD.flatten(0, 1), model.lm_head.weight, label_N, dtype=model.dtype
                )
            if criterion == "entropy":
                assert entropy_N is not None
                score_N = -entropy_N
            else:
                score_N = ops.cosine_score(embedded_BSD.flatten(0, 1), last_BSD.flatten(0, 1))
            blocks = torch.arange(first, first + ids.shape[0], dtype=torch.int32)
            sequence_N = blocks.repeat_interleave(seq_len)
            position_N = torch.arange(seq_len, dtype=torch.int32).repeat(ids.shape[0])
            check_finite(score_N, sequence_N, position_N)
            rows = slice(first * seq_len, (first + ids.shape[0]) * seq_len)
            for name, kept_tensor in kept.items():
                store[name][rows] = kept_tensor.to("cpu", store.hidden.dtype)
            store["label"][rows] = label_N.cpu()
            store["sequence"][rows], store["position"][rows] = sequence_N, position_N
            store["score"][rows] = score_N.cpu()
            if loss_N is not None:
                store["loss"][rows] = loss_N.cpu()
            progress.advance(ids.shape[0] * seq_len)
            if time.monotonic() - last_saved > SAVE_PROGRESS_SECONDS:
                write_json(store.folder / "progress.json", {"blocks": first + ids.shape[0]})
                last_saved = time.monotonic()
    finally:
        hook.remove()
    return True


def _keys_and_values(cache: Any, layers: int) -> Tensor:
    """``(N, L, 2, G, E)`` of the last ``layers`` layers of transformers' cache."""
    kv_L2BGSE = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers[-layers:]])
    return kv_L2BGSE.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
