"""What a cascade is compared with: the methods, and the trainings that a comparison of them takes.

Every method is trained once for each number of epochs, as the learning rate's schedule depends on it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError
from cascade_fast.settings import RunSettings, make_settings

METHODS = {
    "cascade": "the cascade as the flags have it",
    "dense-append": "one appended stage on every token",
    "dense-second-look": "one second look at every token: a fine-tune of the base's last layers",
    "random": "the cascade, with as many tokens drawn by chance as it has hard ones",
    "full": "the full fine-tune of the base",
    "seed": "one stage of the preset seed",
}
# What the seed recipe takes from the flags: text, base and machine; the recipe is its own.
SHARED = (
    "seed", "max_minutes", "checkpoint_minutes", "cache_dir", "report_to", "sample_prompt", "base", "device", "dataset",
    "text_columns", "text_template", "prompt_template", "completion_template", "chat_template", "loss_on", "encoding",
    "streaming", "shuffle", "shuffle_buffer", "seq_len", "train_tokens", "val_tokens", "test_tokens", "train_blocks",
    "val_blocks", "test_blocks", "layers_per_stage",
)  # fmt: skip


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
    settings: RunSettings,
    methods: Sequence[str],
    epochs_list: Sequence[int],
    *,
    full_lr: float,
    second_look_lr: float,
    seed_epochs: int,
) -> list[Training]:
    """Every run to make. ``settings.out`` is the folder of them all.

    Raises:
        InputError: a setting that cannot work.
    """
    if settings.out is None:
        raise InputError("out: not given; must name the folder of the comparison")
    if min(epochs_list) < 1 or len(set(epochs_list)) < len(epochs_list):
        raise InputError(f"epochs_list: {list(epochs_list)}; must be different numbers, each at least 1")
    if settings.criterion == "random" and "random" in methods:
        raise InputError("criterion: 'random'; the method random is the same: leave one out (--skip random)")
    identity: dict[str, Any] = {"init": "identity", "head": "shared", "num_stages": 1, "hard_ratio": 1.0}
    shared = {name: value for name, value in settings.to_dict().items() if name in SHARED}
    seed = make_settings({**shared, "preset": "seed", "num_stages": 1})
    changed: dict[str, Callable[[], RunSettings]] = {
        "cascade": lambda: settings,
        "dense-append": lambda: dataclasses.replace(settings, **identity, stage_kind="append", kv="store"),
        "dense-second-look": lambda: dataclasses.replace(
            settings, **identity, stage_kind="second-look", lr=second_look_lr
        ),
        "random": lambda: dataclasses.replace(settings, criterion="random", sample_prompt=()),
        "full": lambda: dataclasses.replace(settings, lr=full_lr),
        "seed": lambda: seed,
    }
    trainings = []
    for method in methods:
        for epochs in [seed_epochs] if method == "seed" else sorted(epochs_list):
            out = str(Path(settings.out) / f"{method}-{epochs}")
            changes: dict[str, Any] = {"out": out, "epochs": epochs, "resume": "auto"}
            trainings.append(Training(method, dataclasses.replace(changed[method](), **changes)))
    return trainings
