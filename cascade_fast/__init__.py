"""CASCADE: train new layers on the hard tokens of a frozen language model; every token exits as early as it can."""

from typing import Any

from cascade_fast import auto_classes

__version__ = "0.1.0"
__all__ = [
    "CascadeConfig", "CascadeForCausalLM", "HardTokenGather", "HardTokenNeighbors", "RunSettings", "make_settings",
    "run_cascade",
]  # fmt: skip

_HOMES = {
    "CascadeConfig": "model.configuration",
    "CascadeForCausalLM": "model.modeling",
    "HardTokenGather": "hard_token_gather",
    "HardTokenNeighbors": "model.neighbors",
    "RunSettings": "settings",
    "make_settings": "settings",
    "run_cascade": "cascade",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `python -m cascade_fast.train --help` need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


auto_classes.register()
