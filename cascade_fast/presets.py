"""The kinds of stages, as the settings know them, and the presets: settings that go together."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KindEntry:
    """A stage kind by what the settings know of it; its code is ``stages/<name>.py``, with underscores for dashes.

    ``allows``: values of other settings that go with it, where not all do, and why.
    """

    help: str
    allows: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)


STAGE_KINDS = {
    "append": KindEntry(
        "new layers after the base's last",
        {
            "kv": (("auto", "store"), "stages of kind append use none"),
            "adapter": (("none",), "stages of kind append have no layers of the base"),
            "easy_tokens": (("skip",), "stages of kind append take each token for itself"),
        },
    ),
    "second-look": KindEntry(
        "a trained copy of the base's last layers, in which hard tokens attend to their whole text",
        {"init": (("identity",), "a second look starts as the base's own layers, with its head")},
    ),
}

# The recipe of the original experiment: random layers with a head of their own, tokens in batches of 32, fp32.
SEED_PRESET: dict[str, Any] = {
    "dataset": "tatsu-lab/alpaca",
    "train_blocks": 1000,
    "val_blocks": 100,
    "test_blocks": 0,
    "shuffle": "off",
    "dtype": "float32",
    "store_dtype": "float32",
    "hard_ratio": 0.9,
    "criterion": "cosine",
    "val_selection": "quantile",
    "num_stages": 5,
    "init": "random",
    "head": "own",
    "accept": "always",
    "epochs": 10,
    "batch_tokens": 32,
    "lr": 1e-4,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "grad_clip": 0.0,
    "patience": 1,
}
# The best perplexity for the training: see docs/log.md, 2026-11-24.
SECOND_LOOK_PRESET: dict[str, Any] = {
    "stage_kind": "second-look",
    "num_stages": 1,
    "layers_per_stage": 16,
    "epochs": 1,
    "batch_tokens": 256,
    "lr": 2e-4,
}
# LoRA of all layers, on every token: what it ends with is a plain model. See docs/log.md, 2026-11-29.
LORA_PRESET: dict[str, Any] = {
    "stage_kind": "second-look",
    "adapter": "lora",
    "layers_per_stage": "all",
    "hard_ratio": 1.0,
    "num_stages": 1,
    "epochs": 1,
    "lr": 1e-3,
}
PRESETS: dict[str, dict[str, Any]] = {
    "warm": {},
    "lora": LORA_PRESET,
    "second-look": SECOND_LOOK_PRESET,
    "seed": SEED_PRESET,
}
