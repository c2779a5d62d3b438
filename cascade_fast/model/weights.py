"""A cascade without its base's weights: ``stages/<n>/model.safetensors`` and a reference to the base.

A training run leaves its stages so, and ``save_pretrained(..., self_contained=False)`` writes them so.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from cascade_fast.base.model import BaseModel, find_base, weight_files
from cascade_fast.input_checks import InputError, check_type, one_line, shown
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.runtime.files import load_tensors
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage

FILES = ["*.json", "*.jinja", "stages/*"]  # what is read of such a folder on the hub


def local_folder(name: Any, *, more: Sequence[str] = (), **hub: Any) -> Path:
    """The folder of that name, or a snapshot of the hub's repository. ``more``: patterns of files beyond ``FILES``."""
    if os.path.isdir(name):
        return Path(name)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=[*FILES, *more], **hub))


def check_safetensors(where: str, name: Any) -> None:
    """Raises InputError for a local folder with weights of other kinds alone. ``where`` begins the message."""
    if os.path.isdir(name) and not any(Path(name).glob("model*.safetensors")):
        raise InputError(f"{where}; has no model.safetensors: weights are only ever read from safetensors or GGUF")


def checked_load(load: Callable[..., Any], where: str, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' ``load`` of a whole model: it and what it says of loading. ``where`` begins the message.

    Raises:
        InputError: weights that are damaged, of other sizes than the configuration says, missing, or of stages it does
            not name; transformers would draw those that are missing.
    """
    options = dict(options, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    try:
        model, info = load(*args, **options)
    except (InputError, OSError):
        raise
    except Exception as error:  # whatever a damaged file or configuration leads to
        raise InputError(f"{where}; cannot be loaded: {one_line(error)}") from error
    unexpected = (name for name in info["unexpected_keys"] if name.startswith("stages."))
    wrong = sorted({*info["missing_keys"], *unexpected})
    if wrong:
        raise InputError(f"{where}; its weights are not those of its config.json: {len(wrong)} differ, as {wrong[0]}")
    return model, info


def find_base_of(config: CascadeConfig, base_path: str | None = None) -> BaseModel:
    """The base that the stages were trained on, found by the name it had then or at ``base_path``.

    Raises:
        InputError: not found, another model than the one of training (fingerprint of configuration and weights), or
            a package is missing that quantises it as it was then.
    """
    name = base_path or config.base.get("name")
    if name is None:
        raise InputError("base: the configuration names none; pass base_path")
    fingerprint, cache = config.base.get("fingerprint"), config.settings.get("cache_dir")
    if fingerprint is None:
        raise InputError("base: the configuration has no fingerprint of it")
    check_type("settings: cache_dir", cache, str | None)
    settings: dict[str, Any] = {"base": str(name), "seq_len": 2, "base_quantization": config.quantization}
    if cache is not None and os.path.isdir(cache):
        settings["cache_dir"] = cache
    try:
        base = find_base(make_settings(settings))
    except InputError as error:
        raise InputError(f"{error}. If it lies elsewhere now, pass base_path") from error
    if base.fingerprint != fingerprint:
        raise InputError(
            f"base: {shown(name)} is another model than the one the stages were trained on: fingerprint "
            f"{base.fingerprint:.12}, then {shown(fingerprint[:12])[1:-1]}"
        )
    return base


def thin_state(folder: Path, config: CascadeConfig, base: BaseModel) -> dict[str, Tensor]:
    """The weights of base and stages under the names they have in ``CascadeForCausalLM``, mapped from their files.

    Raises:
        InputError: a stage's file is missing.
        DamagedFile: it does not match its checksum, or one of the base's files is missing or damaged.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(Path(base.path)):
        state |= {f"base.{name}": tensor for name, tensor in load_tensors(file)[0].items()}
    for number in range(1, len(config.stages) + 1):
        file = folder / "stages" / str(number) / "model.safetensors"
        if not file.is_file():
            raise InputError(f"stages: {str(file)!r} is missing, but config.json names {len(config.stages)} stage(s)")
        state |= {f"stages.{number - 1}.{name}": tensor for name, tensor in load_tensors(file)[0].items()}
    return state


def load_thin(
    load: Callable[..., tuple[Any, Any]],
    folder: Path,
    config: CascadeConfig,
    base: BaseModel,
    *args: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """The cascade of ``base`` and the stages in ``folder``, and what transformers says of loading.

    Args:
        load: transformers' ``from_pretrained`` within :func:`checked_load`.
        options: of transformers, with ``dtype``.

    Raises:
        InputError: as :func:`checked_load` and :func:`thin_state`.
    """
    model, info = load(None, *args, config=config, state_dict=thin_state(folder, config, base), **options)
    if base.quantization != "none":
        model.base = base.load(model.device, model.dtype)
        model.lend_layers()
    model.base_folder = base.path
    if (Path(base.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base.path)
    return model, info


def write_stages(folder: Path, config: CascadeConfig, stages: nn.ModuleList) -> None:
    """The stages as a training run leaves them."""
    for number, (stage, threshold) in enumerate(zip(stages, config.thresholds, strict=True), 1):
        ExitStage(stage, threshold).save(folder / "stages" / str(number))  # type: ignore[arg-type]
