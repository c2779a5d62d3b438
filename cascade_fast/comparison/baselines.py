"""A cascade beside what else could be trained on the same text: the trainings, and one report of them all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from cascade_fast import cascade
from cascade_fast.comparison.curves import plot_lines
from cascade_fast.comparison.methods import METHODS, Training
from cascade_fast.comparison.runs import Row, base_row, train_all
from cascade_fast.comparison.tables import (
    BEST_COLUMNS,
    COLUMNS,
    best_runs,
    equal_cost_table,
    runs_table,
    verdict,
    winner,
    write_report,
    write_rows,
)
from cascade_fast.input_checks import InputError
from cascade_fast.records import training_text
from cascade_fast.runtime.console import say
from cascade_fast.runtime.processes import by_first
from cascade_fast.runtime.run_folder import REPORT
from cascade_fast.settings import RunSettings
from cascade_fast.training.full_finetune import full_finetune
from cascade_fast.training.lora_finetune import check_peft, lora_finetune

BAR = "lora"  # what most people would train instead


def run_baselines(folder: Path, trainings: Sequence[Training]) -> Path:
    """Trains what is not there yet, and compares; the path of the report.

    Raises:
        InputError: a method that cannot be trained here, or as :func:`train_all`; before any training.
    """
    finetunes: dict[str, Callable[[RunSettings], object]] = {"lora": lora_finetune, "full": full_finetune}
    for training in trainings:
        method, quantization = training.method, training.settings.base_quantization
        if method in finetunes and quantization != "none":
            raise InputError(f"base_quantization: {quantization!r}; must be none for {method} (or --skip lora full)")
    if any(training.method == "lora" for training in trainings):
        check_peft()
    runs = [(t.method, t.settings, finetunes.get(t.method, cascade.run_cascade)) for t in trainings]
    rows = train_all(folder, "baselines", runs)
    by_first(_write_comparison)(folder, rows)
    say(f"report: {folder / REPORT}")
    return folder / REPORT


def _write_comparison(folder: Path, rows: list[Row]) -> None:
    """``report.md``, ``comparison.json``, ``comparison.csv`` and ``curves.png`` of these runs."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    reference = "cascade" if "cascade" in names else names[0]
    best = best_runs(rows)
    for row in rows:
        row["best"] = row in best
    base = base_row(next(row for row in rows if row["name"] == reference))
    write_rows(folder, "baselines", [base, *rows])
    settings = rows[0]["settings"]
    panels = [
        ("seconds", "seconds: base pass and training", True),
        ("trained_tokens", "trained tokens", True),
        ("trained_layer_tokens", "trained tokens x layers trained", True),
    ]
    plot = plot_lines(folder / "curves.png", rows, panels, base_ppl=base["val_ppl"], front=True)
    references = [name for name in (reference, BAR) if name in names]
    verdicts = [verdict(rows, "seconds", name) for name in dict.fromkeys(references)]
    said = winner(rows, BAR)
    say(said.replace("**", ""))  # of Markdown
    parts = [
        "# A cascade and what it is compared with",
        f"Base {settings['base']}, text {settings['dataset']}: {training_text(settings)} "
        f"to train on, the same for all, seed {settings['seed']}.",
        said,
        *verdicts,
        verdict(rows, "trained_tokens", reference),
        "The best run of each method, chosen on validation; the best method first:",
        runs_table(sorted([base, *best], key=lambda row: row["val_ppl"]), BEST_COLUMNS),
        "\n".join(f"- {name}: {_what(name)}" for name in names),
        plot,
        "A point for each run; a line joins those that are better than every run of the method that cost no more.",
        "## At equal seconds",
        "In each line, the best validation perplexity that a method has reached within that time, of the runs that "
        "were made; nothing is read between them.",
        equal_cost_table(rows, "seconds"),
        "## At equal trained tokens",
        equal_cost_table(rows, "trained_tokens"),
        "## All runs",
        "Bold: the run of each method that validation has chosen.",
        runs_table(sorted([base, *rows], key=lambda row: row["val_ppl"]), list(COLUMNS), mark_best=True),
        "Seconds are those of the base pass over all text (also where an earlier run had made it) and of the steps "
        "of training, of one run: not of all that were made to choose a rate. Validation has chosen epochs, stages "
        "and runs; each run measured test once.",
    ]
    write_report(folder, parts)


def _what(name: str) -> str:
    """What a row of this name is."""
    return METHODS.get(name, f"what {name.removesuffix(' merged')} has trained, as one plain model for every token")
