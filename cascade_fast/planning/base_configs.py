"""The configuration of the base that a plan is made for: of a few models without their files, else as it is read."""

from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError

_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
# Shapes as in the models' own config.json (HuggingFaceTB/SmolLM2-*, meta-llama/Meta-Llama-3-8B).
BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _SMOLLM2
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "smollm2-360m": _SMOLLM2
    | {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "smollm2-1.7b": _SMOLLM2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def base_configuration(base: str) -> Any:
    """transformers' configuration of a built-in name, a local folder or a hub id. Raises InputError."""
    # Imported here: the command's --help names the shapes before torch is loaded.
    from transformers import AutoConfig

    from cascade_fast.base.model import hub_reachable, read_base_config

    if base in BUILT_IN:
        return AutoConfig.for_model(**BUILT_IN[base])
    path = Path(base)
    if not path.is_dir() and not hub_reachable():
        raise InputError(
            f"base: {base!r}; must be a folder with a config.json, one of {', '.join(BUILT_IN)}, or a hub id (the hub "
            "cannot be reached)"
        )
    return read_base_config(base, base)
