"""The grid of a sweep: the settings of a run for every combination of some values."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError
from cascade_fast.settings import RunSettings, make_settings

# In this order runs that share a base pass follow one another: the cache keeps the last few.
GRID = ("stage_kind", "layers_per_stage", "criterion", "train_criterion", "easy_tokens", "lr", "hard_ratio")


def make_grid(given: dict[str, Any], settings_file: str | None = None) -> list[RunSettings]:
    """The settings of every run. Of the names in :data:`GRID`, ``given`` holds lists.

    Raises:
        InputError: an empty or repeated value, or settings that cannot work.
    """
    given = dict(given)
    for name in GRID:
        if name in given and not given[name]:
            raise InputError(f"{name}: no value; give at least one")
    base = make_settings({n: value[0] if n in GRID else value for n, value in given.items()}, settings_file)
    if base.out is None:
        raise InputError("out: not given; must name the folder of the sweep")
    if base.resume != "never":
        raise InputError(f"resume: {base.resume!r}; leave it out: a sweep always goes on where it was")
    values = {name: given.pop(name, [getattr(base, name)]) for name in GRID}
    points = itertools.product(*values.values())
    asked = [make_settings({**given, **dict(zip(GRID, point, strict=True))}, settings_file) for point in points]
    names = [run_name(settings) for settings in asked]
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(GRID)}: a value is given twice")
    grid = {run_name(settings): settings for settings in map(_as_few_names, asked)}
    return [dataclasses.replace(s, out=str(Path(base.out) / name), resume="auto") for name, s in grid.items()]


def _as_few_names(settings: RunSettings) -> RunSettings:
    """The same run where it can be asked for in several ways: where all tokens are trained on, nobody chooses."""
    if settings.hard_ratio == 1:
        return dataclasses.replace(settings, train_criterion=None, easy_tokens="skip")
    apart = settings.train_criterion != settings.criterion
    return settings if apart else dataclasses.replace(settings, train_criterion=None)


def run_name(settings: RunSettings) -> str:
    """All of :data:`GRID`, so that a run has the same name in a larger sweep; of the two that came later, what is not
    the default."""
    s, layers = settings, settings.to_dict()["layers_per_stage"]  # a number, or ``all``
    later = "".join(f"-{value}" for value in (s.train_criterion, s.easy_tokens) if value not in (None, "skip"))
    return f"{s.stage_kind}-L{layers}-{s.criterion}{later}-lr{s.lr:g}-r{s.hard_ratio:g}"
