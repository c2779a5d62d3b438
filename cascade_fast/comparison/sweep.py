"""A cascade for every combination of some settings: the trainings, and one report of them all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_fast import cascade
from cascade_fast.comparison.curves import plot_lines
from cascade_fast.comparison.grid import GRID, run_name
from cascade_fast.comparison.runs import Row, base_row, train_all
from cascade_fast.comparison.tables import COLUMNS, runs_table, write_report, write_rows
from cascade_fast.records import training_text
from cascade_fast.runtime.console import say
from cascade_fast.runtime.processes import by_first
from cascade_fast.runtime.run_folder import REPORT
from cascade_fast.settings import RunSettings


def run_sweep(folder: Path, grid: Sequence[RunSettings]) -> Path:
    """Trains what is not there yet, and compares; the path of the report."""
    rows = train_all(folder, "sweep", [("", settings, cascade.run_cascade) for settings in grid])
    rows = [row for row in rows if not row["merged"]]
    by_first(_write_comparison)(folder, rows, {run_name(settings): settings.to_dict() for settings in grid})
    say(f"report: {folder / REPORT}")
    return folder / REPORT


def _write_comparison(folder: Path, rows: list[Row], asked: dict[str, dict[str, Any]]) -> None:
    """``report.md``, ``comparison.json``, ``comparison.csv`` and ``sweep.png`` of these runs. ``asked``: the settings
    of each by its folder's name, as they were given: ``all`` layers where ``results.json`` has their number."""
    # A line for each criterion and whatever else differs; along a line, the hard ratio.
    vary = [n for n in GRID if n != "hard_ratio" and len({a[n] for a in asked.values()}) > 1]
    for row in rows:
        row["name"] = _label(asked[row["folder"]], vary or ["criterion"])
        row["hard_ratio"] = row["settings"]["hard_ratio"]
    table_rows = [{**row, "name": _label(asked[row["folder"]], [*vary, "hard_ratio"])} for row in rows]
    base = base_row(rows[0])
    write_rows(folder, "sweep", [base, *table_rows])
    columns = [name for name in COLUMNS if name not in ("variant", "merged")]  # the name has what varies
    panels = [
        ("hard_ratio", "hard ratio", False),
        ("layers_per_token", "layers per token", False),
        ("seconds", "seconds: base pass and training", True),
    ]
    plot = plot_lines(folder / "sweep.png", rows, panels, base_ppl=base["val_ppl"])
    best = min(table_rows, key=lambda r: r["val_ppl"])
    settings = rows[0]["settings"]
    test = "" if best["test_ppl"] is None else f" and {best['test_ppl']:.4f} on test"
    parts = [
        "# Sweep",
        f"Base {settings['base']}, text {settings['dataset']}: {training_text(settings)} "
        f"to train on, seed {settings['seed']}, at most {settings['num_stages']} stage(s) "
        f"and {settings['epochs']} epoch(s).",
        f"The lowest all-token validation perplexity is {best['val_ppl']:.4f} ({best['val_change']:.4f} x base){test}: "
        f"**{best['name']}**, at {best['layers_per_token']:.2f} layers per token. Of {len(rows)} runs it is the "
        "best by the validation text that chose it.",
        runs_table([base, *table_rows], columns),
        plot,
        "Layers per token: the base's, and a stage's for the share of the validation tokens that entered it. Seconds "
        "are those of the base pass over all text (also where an earlier run had made it) and of the training steps.",
    ]
    write_report(folder, parts)


def _label(asked: dict[str, Any], names: Sequence[str]) -> str:
    words = {"layers_per_stage": "{} layers", "lr": "lr {:g}", "hard_ratio": "r = {:g}"}
    return ", ".join(words.get(name, "{}").format(asked[name]) for name in names)
