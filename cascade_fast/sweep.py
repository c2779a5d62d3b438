"""``python -m cascade_fast.sweep``: a cascade for every combination of some settings, and one report of them all.

Finished runs are kept and interrupted ones go on, so the same command, or one with more values, adds what is missing.
Runs with the same base pass share it. See ``docs/compare.md``.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_fast.command_line import run_command, settings_parser
from cascade_fast.input_checks import InputError
from cascade_fast.settings import RunSettings, make_settings

DESCRIPTION = (
    "Train a cascade for every combination of the values given, and compare them. Takes every flag of the trainer; "
    "hard-ratio, criterion, layers-per-stage, lr and stage-kind take several values. The same command again goes on "
    "where it was."
)
# In this order runs that share a base pass follow one another: the cache keeps the last few.
GRID = ("stage_kind", "layers_per_stage", "criterion", "lr", "hard_ratio")


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
    grid = []
    for point in itertools.product(*values.values()):
        settings = make_settings({**given, **dict(zip(GRID, point, strict=True))}, settings_file)
        grid.append(dataclasses.replace(settings, out=str(Path(base.out) / run_name(settings)), resume="auto"))
    for settings in grid:
        if [c.out for c in grid].count(settings.out) > 1:
            raise InputError(f"{', '.join(GRID)}: a value is given twice")
    return grid


def run_name(settings: RunSettings) -> str:
    """All of :data:`GRID`, so that a run has the same name in a larger sweep."""
    s = settings
    return f"{s.stage_kind}-L{s.layers_per_stage}-{s.criterion}-lr{s.lr:g}-r{s.hard_ratio:g}"


def run_sweep(folder: Path, grid: Sequence[RunSettings]) -> Path:
    """Trains what is not there yet, and compares; the path of the report."""
    from cascade_fast import cascade
    from cascade_fast.comparison.runs import train_all
    from cascade_fast.runtime.console import say

    rows = train_all(folder, "sweep", [("", settings, cascade.run_cascade) for settings in grid])
    report = write_comparison(folder, rows)
    say(f"report: {report}")
    return report


def write_comparison(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """``report.md``, ``comparison.json``, ``comparison.csv`` and ``sweep.png`` of these runs."""
    from cascade_fast.comparison import runs as comparison

    # A line for each criterion and whatever else differs; along a line, the hard ratio.
    vary = [n for n in GRID if n != "hard_ratio" and len({r["settings"][n] for r in rows}) > 1]
    for row in rows:
        row["name"] = _label(row, vary or ["criterion"])
        row["hard_ratio"] = row["settings"]["hard_ratio"]
    table_rows = [{**row, "name": _label(row, [*vary, "hard_ratio"])} for row in rows]
    base = comparison.base_row(rows[0])
    table = comparison.write_tables(folder, "sweep", [base, *table_rows])
    panels = [
        ("hard_ratio", "hard ratio", False),
        ("layers_per_token", "layers per token", False),
        ("seconds", "seconds: base pass and training", True),
    ]
    plot = comparison.plot_lines(folder / "sweep.png", rows, panels, base_ppl=base["val_ppl"])
    best = min(table_rows, key=lambda r: r["val_ppl"])
    settings = rows[0]["settings"]
    test = "" if best["test_ppl"] is None else f" and {best['test_ppl']:.4f} on the test blocks"
    parts = [
        "# Sweep",
        f"Base {settings['base']}, text {settings['dataset']}: {settings['train_blocks']} blocks of "
        f"{settings['seq_len']} tokens to train on, seed {settings['seed']}, at most {settings['num_stages']} stage(s) "
        f"and {settings['epochs']} epoch(s).",
        f"The lowest all-token validation perplexity is {best['val_ppl']:.4f} ({best['val_change']:.4f} x base){test}: "
        f"**{best['name']}**, at {best['layers_per_token']:.2f} layers per token. Of {len(rows)} runs it is the "
        "best by the blocks that chose it.",
        table,
        plot,
        "Layers per token: the base's, and a stage's for the share of the validation tokens that entered it. Seconds "
        "are those of the base pass over all blocks (also where an earlier run had made it) and of the training steps.",
    ]
    return comparison.write_report(folder, parts)


def _label(row: dict[str, Any], names: Sequence[str]) -> str:
    short = {"criterion": "{}", "stage_kind": "{}", "layers_per_stage": "{} layers", "lr": "lr {:g}"}
    return ", ".join({**short, "hard_ratio": "r = {:g}"}[n].format(row["settings"][n]) for n in names)


def sweep_parser() -> argparse.ArgumentParser:
    return settings_parser("python -m cascade_fast.sweep", DESCRIPTION, several=GRID)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of the trainer."""
    given = vars(sweep_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)

    def work() -> None:
        from cascade_fast.runtime.console import quiet_libraries

        quiet_libraries()
        grid = make_grid(given, settings_file)
        assert grid[0].out is not None
        run_sweep(Path(grid[0].out).parent, grid)

    return run_command(work, debug=debug, again="the same command")


if __name__ == "__main__":
    sys.exit(main())
