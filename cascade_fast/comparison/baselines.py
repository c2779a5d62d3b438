"""A cascade beside what else could be trained on the same text: the trainings, and one report of them all."""

from collections.abc import Sequence
from pathlib import Path

from cascade_fast import cascade
from cascade_fast.comparison.curves import plot_lines
from cascade_fast.comparison.methods import METHODS, Training
from cascade_fast.comparison.runs import Row, base_row, train_all
from cascade_fast.comparison.tables import equal_cost_table, verdict, write_report, write_tables
from cascade_fast.input_checks import InputError
from cascade_fast.records import training_text
from cascade_fast.runtime.console import say
from cascade_fast.training.full_finetune import full_finetune


def run_baselines(folder: Path, trainings: Sequence[Training]) -> Path:
    """Trains what is not there yet, and compares; the path of the report."""
    if any(t.method == "full" and t.settings.base_quantization != "none" for t in trainings):
        raise InputError("base_quantization: must be none for the full fine-tune (or --skip full)")
    runs = [(t.method, t.settings, full_finetune if t.method == "full" else cascade.run_cascade) for t in trainings]
    rows = train_all(folder, "baselines", runs)
    report = _write_comparison(folder, rows)
    say(f"report: {report}")
    return report


def _write_comparison(folder: Path, rows: list[Row]) -> Path:
    """``report.md``, ``comparison.json``, ``comparison.csv`` and ``curves.png`` of these runs."""
    methods = list(dict.fromkeys(row["name"] for row in rows))
    reference = "cascade" if "cascade" in methods else methods[0]
    base = base_row(next(row for row in rows if row["name"] == reference))
    table = write_tables(folder, "baselines", [base, *rows])
    settings = rows[0]["settings"]
    panels = [
        ("seconds", "seconds: base pass and training", True),
        ("trained_tokens", "trained tokens", True),
        ("trained_layer_tokens", "trained tokens x layers trained", True),
    ]
    plot = plot_lines(folder / "curves.png", rows, panels, base_ppl=base["val_ppl"])
    parts = [
        "# A cascade and what it is compared with",
        f"Base {settings['base']}, text {settings['dataset']}: {training_text(settings)} "
        f"to train on, the same for all, seed {settings['seed']}.",
        verdict(rows, "seconds", reference),
        verdict(rows, "trained_tokens", reference),
        table,
        "\n".join(f"- {name}: {METHODS[name]}" for name in methods),
        plot,
        "## At equal seconds",
        "In each line, the best validation perplexity that a method has reached within that time, of the runs that "
        "were made; nothing is read between them.",
        equal_cost_table(rows, "seconds"),
        "## At equal trained tokens",
        equal_cost_table(rows, "trained_tokens"),
        "Seconds are those of the base pass over all text (also where an earlier run had made it) and of the steps "
        "of training. Validation has chosen epochs and stages; each run measured test once.",
    ]
    return write_report(folder, parts)
