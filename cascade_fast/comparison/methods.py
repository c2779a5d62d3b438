"""What a cascade is compared with: the methods, and the trainings that a comparison of them takes.

Every method is trained once for each number of epochs, as the learning rate's schedule depends on it; LoRA and the full
fine-tune also once for each rate (and rank), since they are bars only at rates that suit them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError
from cascade_fast.records import routed_by, trained_by
from cascade_fast.settings import RunSettings, make_settings

METHODS = {
    "cascade": "the cascade as the flags have it",
    "dense-append": "one appended stage on every token",
    "dense-second-look": "one second look at every token: a fine-tune of the base's last layers",
    "random": "the cascade, with as many tokens drawn by chance as it has hard ones",
    "lora": "LoRA (library peft) on every linear layer of the base, on every token",
    "full": "the full fine-tune of the base, on every token",
    "seed": "one stage of the preset seed",
}
# What the seed recipe takes from the flags: text, base and machine; the recipe is its own.
SHARED = (
    "seed", "max_minutes", "checkpoint_minutes", "cache_dir", "report_to", "sample_prompt", "base", "device", "dataset",
    "text_columns", "text_template", "prompt_template", "completion_template", "chat_template", "loss_on", "encoding",
    "streaming", "shuffle", "shuffle_buffer", "general_dataset", "seq_len", "train_tokens", "val_tokens", "test_tokens",
    "train_blocks", "val_blocks", "test_blocks", "layers_per_stage",
)  # fmt: skip
LORA_ALPHA = 32.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What the methods are trained with that is no setting of the cascade's; each a flag of the command.

    Attributes:
        finetune_batch_tokens: tokens in a step of LoRA and the full fine-tune. Their rates were chosen for the default,
            so that a preset's number for cascades is none for them.
    """

    lora_ranks: Sequence[int] = (16, 64)
    lora_lrs: Sequence[float] = (6e-4, 1e-3, 2e-3)
    full_lrs: Sequence[float] = (7e-5, 1.3e-4, 2.5e-4)
    second_look_lr: float = 4e-4
    seed_epochs: int = 1
    finetune_batch_tokens: int = 512

    def __post_init__(self) -> None:
        """Raises InputError for a value that cannot be."""
        _check_values("lora_ranks", self.lora_ranks, "at least 1", lambda rank: rank >= 1)
        for name in ("lora_lrs", "full_lrs"):
            _check_values(name, getattr(self, name), "above 0", lambda lr: math.isfinite(lr) and lr > 0)


@dataclass(frozen=True)
class Training:
    """One run: method, and settings with ``out`` and ``epochs`` filled in."""

    method: str
    settings: RunSettings


def choose_methods(only: Sequence[str] | None, skip: Sequence[str]) -> list[str]:
    """The methods to train, in their order. Raises InputError for a name that is none, and where none is left."""
    for flag, names in (("only", only or ()), ("skip", skip)):
        for name in names:
            if name not in METHODS:
                raise InputError(f"{flag}: {name!r}; must be one of {', '.join(METHODS)}")
    chosen = [name for name in METHODS if (only is None or name in only) and name not in skip]
    if not chosen:
        raise InputError("only, skip: no method is left to train")
    return chosen


def plan_trainings(
    settings: RunSettings, methods: Sequence[str], epochs_list: Sequence[int], grid: Grid
) -> list[Training]:
    """Every run to make. ``settings.out`` is the folder of them all.

    Raises:
        InputError: a setting that cannot work.
    """
    if settings.out is None:
        raise InputError("out: not given; must name the folder of the comparison")
    _check_values("epochs_list", epochs_list, "at least 1", lambda epochs: epochs >= 1)
    if trained_by(settings) == routed_by(settings) == "random" and "random" in methods:
        raise InputError("criterion: 'random'; the method random is the same: leave one out (--skip random)")
    identity: dict[str, Any] = {"init": "identity", "head": "shared", "num_stages": 1, "hard_ratio": 1.0}
    shared = {name: value for name, value in settings.to_dict().items() if name in SHARED}
    by_chance: dict[str, Any] = {
        "criterion": "random", "train_criterion": None, "route_criterion": None, "sample_prompt": (),
    }  # fmt: skip
    seed = make_settings({**shared, "preset": "seed", "num_stages": 1})
    finetune = dataclasses.replace(settings, batch_tokens=grid.finetune_batch_tokens)
    # By method: what is trained for each number of epochs, by what its folder's name has beside the method's.
    variants: dict[str, Callable[[], dict[str, RunSettings]]] = {
        "cascade": lambda: {"": settings},
        "dense-append": lambda: {
            "": dataclasses.replace(settings, **identity, stage_kind="append", adapter="none", kv="store")
        },
        "dense-second-look": lambda: {
            "": dataclasses.replace(
                settings, **identity, stage_kind="second-look", adapter="none", lr=grid.second_look_lr
            )
        },
        "random": lambda: {"": dataclasses.replace(settings, **by_chance)},
        "lora": lambda: {
            f"-r{rank}-lr{lr}": dataclasses.replace(
                finetune, lr=lr, lora_rank=rank, lora_alpha=LORA_ALPHA, lora_targets=()
            )
            for rank in grid.lora_ranks
            for lr in grid.lora_lrs
        },
        "full": lambda: {f"-lr{lr}": dataclasses.replace(finetune, lr=lr) for lr in grid.full_lrs},
        "seed": lambda: {"": seed},
    }
    trainings = []
    for method in methods:
        for variant, of in variants[method]().items():
            for epochs in [grid.seed_epochs] if method == "seed" else sorted(epochs_list):
                out = str(Path(settings.out) / f"{method}{variant}-{epochs}")
                trainings.append(Training(method, dataclasses.replace(of, out=out, epochs=epochs, resume="auto")))
    return trainings


def _check_values(name: str, values: Sequence[Any], allowed: str, fits: Callable[[Any], bool]) -> None:
    """Raises InputError unless there are some, each fits, and none is there twice."""
    if not values or len(set(values)) < len(values) or not all(map(fits, values)):
        raise InputError(f"{name}: {list(values)}; must be different numbers, each {allowed}")
