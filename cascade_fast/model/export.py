"""A cascade of one second look as others load it: a plain model of the base's class, or a LoRA adapter of the base.

Where every token enters a second look, each attends to the stage's own keys and values alone. The base's layers before
the stage, the stage's layers and norm, and the base's head are then a plain model of as many layers as the base: the
cascade with its threshold at +inf. An adapter (LoRA, arXiv 2106.09685) is the same model as an update of the base's.

Weights go from file to file, mapped: no cascade is built.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade_fast.base.model import BaseModel, weight_files
from cascade_fast.input_checks import InputError, shown
from cascade_fast.model.card import base_license, render_adapter_card, render_merged_card
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.loading import looking_for
from cascade_fast.model.weights import checked_load, find_base_of, local_folder
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.runtime.console import working
from cascade_fast.runtime.files import (
    DamagedFile,
    atomic_write_text,
    check_new_folder,
    load_tensors,
    new_folder,
    read_json,
)
from cascade_fast.stages.kind import get_kind

SHARD_SIZE = "5GB"  # of a file of weights, at most
EMBEDDINGS = "model.embed_tokens.weight"
# What a tokenizer is made of. Copied as they are: other programs tell tokenizers apart by these files.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
HELD = ["*.model", "*.txt", "model*.safetensors", "README.md"]  # what else is read of a self-contained cascade


def export(run: str, to: Path, *, format: str, dtype: str = "auto", base_path: str | None = None) -> list[str]:
    """Writes ``run`` to the folder ``to``; what to tell the user, in lines.

    Args:
        run: folder of a finished run, a saved cascade, or its hub id.
        format: ``merged`` or ``peft``.
        dtype: of the weights; ``auto``: what those of the base (merged) or of the adapter (peft) are stored in.
        base_path: where the base is now, if not where it was in training.

    Raises:
        InputError: no finished cascade, one that is no plain model or no adapter (and why), a base that is not found
            or is another one, a folder that is there already, or weights beyond the dtype. Nothing is written then.
        DamagedFile: weights that do not match their checksum, or are not those that the configuration names.
    """
    check_new_folder(f"to: {str(to)!r}", to)
    source = Source.find(run, format, base_path)
    asked = None if dtype == "auto" else getattr(torch, dtype)
    with working(f"writing {to}"):
        return _export_adapter(source, to, asked) if format == "peft" else _export_merged(source, to, asked)


# --- what can be exported ---------------------------------------------------------------------------------------------


def why_not_mergeable(config: CascadeConfig) -> str | None:
    """Why no plain model is the cascade with open thresholds; None where one is."""
    if not config.stages:
        return "the run kept no stage, so the cascade is its base: use that"
    stages = [config.stage_config(number) for number in range(1, len(config.stages) + 1)]
    if get_kind(config.kind).mergeable(stages):
        return None
    if not config.attends:
        return (
            "its stages come after the base's last layer and take each token by itself, which no layer of a plain "
            "model does. Train with --stage-kind second-look"
        )
    return (
        f"it has {len(config.stages)} stages: a plain model has room for one, and the second was trained only on what "
        "the first had left. Train with --num-stages 1"
    )


def _check(config: CascadeConfig, format: str) -> None:
    """Raises InputError where the cascade cannot be written so."""
    why = why_not_mergeable(config)
    if why is None and format == "peft" and _lora(config) is None:
        why = (
            "its stage is a trained copy of whole layers and no low-rank update: use --format merged, or train with "
            "--adapter lora"
        )
    if why is None and format == "merged" and config.quantization != "none":
        # Updates of 4-bit weights added to the 16-bit ones are another model than the one that was measured.
        why = (
            f"its stage was trained on a base in 4 bit ({config.quantization}): merged into the 16-bit weights it "
            "would be another model than was measured. Use --format peft, on the base in 4 bit"
        )
    if why is not None:
        raise InputError(f"format: {format!r}; {why}")


def _lora(config: CascadeConfig) -> dict[str, Any] | None:
    """``rank``, ``alpha`` and ``targets`` of the one stage's updates; None where it is a copy of whole layers."""
    return config.stages[0].get("lora")


@dataclass(frozen=True)
class Source:
    """A cascade that can be exported, and where its weights are. ``base``: None where ``folder`` holds its weights."""

    config: CascadeConfig
    folder: Path
    base: BaseModel | None

    @classmethod
    def find(cls, run: str, format: str, base_path: str | None) -> "Source":
        """Raises InputError as :func:`export`."""
        with looking_for(run):
            config = CascadeConfig.from_pretrained(run)
            _check(config, format)
            folder = local_folder(run, more=HELD if config.self_contained else ())
        if config.self_contained and format == "merged":
            return cls(config, folder, None)
        config = copy.deepcopy(config)
        # Its weights are not loaded in 4 bit here, and what that needs may be missing.
        base = find_base_of(_unquantized(config), base_path)
        config.base_config = copy.deepcopy(base.config)  # what the fingerprint stands for, whatever the file says
        config.check()
        return cls(config, folder, base)

    @property
    def base_folder(self) -> Path:
        return self.folder if self.base is None else Path(self.base.path)

    def base_weights(self) -> dict[str, Tensor]:
        """By the names of the base's own class."""
        return _read(self.base_folder) if self.base is not None else _read(self.folder, "base.")

    def stage_weights(self) -> dict[str, Tensor]:
        """Of the one stage, by its own names."""
        if self.config.self_contained:
            return _read(self.folder, "stages.0.")
        return load_tensors(self.folder / "stages" / "1" / "model.safetensors")[0]


def _unquantized(config: CascadeConfig) -> CascadeConfig:
    config = copy.deepcopy(config)
    config.base = {**config.base, "quantization": "none"}
    return config


def _read(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a model folder whose names begin with ``prefix``, without it, mapped. Raises DamagedFile."""
    weights = {name: tensor for file in weight_files(folder) for name, tensor in load_tensors(file)[0].items()}
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


# --- weights ----------------------------------------------------------------------------------------------------------


def name_in_base(name: str, entry_layer: int) -> str:
    """The base's name for a stage's parameter: its layer 0 is the base's ``entry_layer``."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{entry_layer + int(found[1])}.{found[2]}" if found else f"model.{name}"


def merged_weights(
    base: Mapping[str, Tensor],
    stage: Mapping[str, Tensor],
    *,
    layers: range,
    lora: dict[str, Any] | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The weights of the plain model in ``dtype``, by the names of the base's class.

    Args:
        base, stage: weights under their own names, in any dtype.
        layers: of the base, those that the stage has in their place.
        lora: the stage's updates ``rank``, ``alpha``, ``targets``: ``W + B @ A * alpha / rank``, in float32, rounded
            once. None: the stage has the layers' weights and the final norm's.

    Raises:
        DamagedFile: the stage's weights are not those.
        InputError: a value is beyond ``dtype``.
    """
    copied: dict[str, Tensor] = {}
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    if lora is None:
        copied = {name_in_base(name, layers.start): tensor for name, tensor in stage.items()}
        expected = {name: tensor.shape for name, tensor in base.items() if _replaced(name, layers)}
        if {name: tensor.shape for name, tensor in copied.items()} != expected:
            raise DamagedFile("stages: the weights of stage 1 are not those of the layers that config.json names")
    else:
        updates = _updates(base, stage, layers, lora)

    def merged(name: str, tensor: Tensor) -> Tensor:  # one at a time: float32 may be twice the model
        if name not in updates:
            return copied.get(name, tensor)
        a, b = updates[name]
        assert lora is not None
        return tensor.float() + (b.float() @ a.float()) * (lora["alpha"] / lora["rank"])

    return {name: _rounded(name, merged(name, tensor), dtype) for name, tensor in base.items()}


def _replaced(name: str, layers: range) -> bool:
    """Whether a parameter of the base is one that a copy of ``layers`` has trained."""
    found = re.fullmatch(r"model\.layers\.(\d+)\..+\.(weight|bias)", name)
    return name == "model.norm.weight" or (found is not None and int(found[1]) in layers)


def _updates(
    base: Mapping[str, Tensor], stage: Mapping[str, Tensor], layers: range, lora: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """``A`` (rank, in) and ``B`` (out, rank) of every weight of the base that is updated, by its name. Raises
    DamagedFile."""
    updated = re.compile(rf".*\.({'|'.join(map(re.escape, lora['targets']))})\.weight")
    expected = {n: t.shape for n, t in base.items() if _replaced(n, layers) and updated.fullmatch(n)}
    found = {name_in_base(name, layers.start): tensor for name, tensor in stage.items()}
    pairs = {}
    for name, (rows, columns) in expected.items():
        module = name.removesuffix(".weight")
        a, b = (found.pop(f"{module}.lora_{which}.weight", None) for which in "AB")
        if a is None or b is None or a.shape != (lora["rank"], columns) or b.shape != (rows, lora["rank"]):
            raise DamagedFile(f"stages: stage 1 has no update of {module} as config.json names it")
        pairs[name] = a, b
    if found:
        raise DamagedFile(f"stages: stage 1 has {next(iter(found))}, which config.json does not name")
    return pairs


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``; what has it already stays in its file. Raises InputError where a value is beyond it."""
    if tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        raise InputError(f"dtype: {dtype_name(dtype)}; {name} has values beyond it: use bfloat16 or float32")
    return rounded


# --- a plain model ----------------------------------------------------------------------------------------------------


def _export_merged(source: Source, to: Path, dtype: torch.dtype | None) -> list[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config, base = source.config, source.base_weights()
    if EMBEDDINGS not in base:
        raise DamagedFile(f"base: {str(source.base_folder)!r} has no {EMBEDDINGS}")
    layers, lora = _layers(config), _lora(config)
    dtype = base[EMBEDDINGS].dtype if dtype is None else dtype
    weights = merged_weights(base, source.stage_weights(), layers=layers, lora=lora, dtype=dtype)
    plain = copy.deepcopy(config.base_config)
    for name in ("auto_map", "quantization_config"):  # of a repository's code, which is never run
        plain.__dict__.pop(name, None)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(plain)]
    where = f"base: {shown(config.base.get('name'))}"
    model, _ = checked_load(model_class.from_pretrained, where, None, config=plain, state_dict=weights, dtype=dtype)
    with new_folder(to, size=sum(t.numel() * t.element_size() for t in weights.values())) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        _copy_beside(source.base_folder, folder)
        card = render_merged_card(
            config,
            model_class=model_class.__name__,
            dtype=dtype_name(dtype),
            parameters=model.num_parameters(),
            license=base_license(config, str(source.base_folder)),
        )
        atomic_write_text(folder / "README.md", card)
    return [
        f"wrote {to}: {model_class.__name__} in {dtype_name(dtype)}, {_size(to)}",
        f"layers a token: {layers.stop}, as the base (the cascade: {layers.stop}, and {len(layers)} more for a token "
        "that enters its stage)",
        f"load it: AutoModelForCausalLM.from_pretrained({str(to)!r})",
    ]


def _layers(config: CascadeConfig) -> range:
    """The base's layers that the stage has in their place."""
    assert config.entry_layer is not None
    return range(config.entry_layer, config.num_hidden_layers)


def _copy_beside(base_folder: Path, folder: Path) -> None:
    """The base's tokenizer and settings of generation, as far as it has them."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        fields = read_json(path)
        if fields.pop("auto_map", None) is not None:  # of a repository's code, which is never run
            atomic_write_text(path, json.dumps(fields, indent=2) + "\n")


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 2**20:,.1f} MiB"


# --- an adapter -------------------------------------------------------------------------------------------------------


def adapter_config(config: CascadeConfig, base: BaseModel) -> dict[str, Any]:
    """PEFT's ``LoraConfig`` of the stage, as its ``adapter_config.json`` has it."""
    lora, layers = _lora(config), _layers(config)
    assert lora is not None
    alpha = float(lora["alpha"])
    part = {"layers_to_transform": list(layers), "layers_pattern": "layers"} if layers.start else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # What PEFT looks for: an id on the hub with its revision, or a folder.
        "base_model_name_or_path": base.source if base.revision else str(Path(base.path).resolve()),
        "revision": base.revision,
        "inference_mode": True,
        "r": lora["rank"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora["targets"]),
        **part,
    }


def _export_adapter(source: Source, to: Path, dtype: torch.dtype | None) -> list[str]:
    config, base, layers = source.config, source.base, _layers(source.config)
    assert base is not None
    fields, lora = adapter_config(config, base), _lora(config) or {}
    updates = _updates(source.base_weights(), source.stage_weights(), layers, lora)
    tensors = {}
    for name, pair in updates.items():
        for which, tensor in zip("AB", pair, strict=True):
            whole = f"base_model.model.{name.removesuffix('.weight')}.lora_{which}.weight"
            tensors[whole] = _rounded(whole, tensor, dtype or tensor.dtype).contiguous()
    parameters = sum(t.numel() for t in tensors.values())
    with new_folder(to, size=sum(t.numel() * t.element_size() for t in tensors.values())) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # Not write_json: PEFT would warn of a checksum.
        atomic_write_text(folder / "adapter_config.json", json.dumps(fields, indent=2) + "\n")
        license = base_license(config, base.path)
        card = render_adapter_card(config, fields=fields, parameters=parameters, license=license)
        atomic_write_text(folder / "README.md", card)
    name = fields["base_model_name_or_path"]
    loaded = f"AutoModelForCausalLM.from_pretrained({name!r})"
    lines = [
        f"wrote {to}: LoRA of rank {lora['rank']} on {len(updates)} linear layers, {_size(to)}",
        f"layers a token: {layers.stop}, as the base (the cascade: {layers.stop}, and {len(layers)} more for a token "
        "that enters its stage)",
        f"load it: PeftModel.from_pretrained({loaded}, {str(to)!r})",
    ]
    if config.quantization != "none":
        lines.append(f"note: it was trained on the base in 4 bit ({config.quantization}): load the base so")
    if base.revision is None:
        lines.append("note: adapter_config.json names the base's folder on this machine: change it before you share it")
    return lines
