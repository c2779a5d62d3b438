"""Several runs side by side: a row of numbers for each, tables, plots, and who is ahead at equal cost.

Everything is read from the runs' ``results.json``. What a run has cost to train:

``seconds``              the base pass (also where an earlier run had made it) and the steps of training; not what all
                         runs alike have around it: loading, validation, reports
``trained_tokens``       tokens in the steps of training, of every stage and epoch
``trained_layer_tokens`` each of them times the layers that were trained on it
``layers_per_token``     of the result, on validation: base layers, and a stage's for the share of tokens that entered
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.console import markdown_table, say
from cascade_fast.runtime.files import atomic_write, atomic_write_text, read_json, write_json
from cascade_fast.settings import RunSettings

RECORD = "comparison.json"
COLUMNS = {  # what the tables show, in order: heading and format
    "name": ("run", "{}"),
    "epochs": ("epochs", "{}"),
    "val_ppl": ("validation ppl", "{:.4f}"),
    "val_change": ("x base", "{:.4f}"),
    "test_ppl": ("test ppl", "{:.4f}"),
    "test_change": ("x base", "{:.4f}"),
    "seconds": ("seconds", "{:.1f}"),
    "base_pass_seconds": ("of them base pass", "{:.1f}"),
    "process_seconds": ("whole process", "{:.1f}"),
    "trained_tokens": ("trained tokens", "{:,}"),
    "trained_layer_tokens": ("trained layer-tokens", "{:,}"),
    "layers_per_token": ("layers per token", "{:.2f}"),
    "stages": ("stages kept", "{}"),
}
Row = dict[str, Any]


def open_folder(folder: Path, command: str) -> None:
    """Makes ``folder`` the one of a comparison by ``command``, or finds it so.

    Raises:
        InputError: it holds something else; nothing in it has been touched then.
    """
    if folder.exists():
        record = folder / RECORD
        found = read_json(record) if record.exists() else {}
        if found.get("command") != command and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {str(folder)!r}; exists and is not the folder of a {command} comparison")
        if found.get("command") == command:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"command": command, "rows": []})


def train_all(
    folder: Path, command: str, runs: Sequence[tuple[str, RunSettings, Callable[[RunSettings], object]]]
) -> list[Row]:
    """Trains what is not there yet of ``runs``: name, settings with ``out``, and what trains them; their rows.

    Raises:
        InputError: a base that cannot be had or copied, or a folder that holds something else; before any training.
    """
    from cascade_fast.cascade import NonFiniteLoss
    from cascade_fast.stages.kind import find_base_for_stages

    for settings in {(c.stage_kind, c.layers_per_stage): c for _, c, _ in runs}.values():
        find_base_for_stages(settings)
    open_folder(folder, command)
    rows = []
    for number, (name, settings, train) in enumerate(runs, 1):
        assert settings.out is not None
        say(f"[{number}/{len(runs)}] {Path(settings.out).name}, {settings.epochs} epoch(s)")
        try:
            train(settings)
        except NonFiniteLoss as error:  # its results and report have been written: it counts as it is
            say(f"  {error}")
        rows.append(read_run(Path(settings.out), name))
    return rows


def read_run(folder: Path, name: str) -> Row:
    """The row of a finished run, a cascade or a full fine-tune; numbers as ``results.json`` has them."""
    results = read_json(folder / "results.json", needs=("base", "final", "settings"))
    base, final, settings = results["base"], results["final"], results["settings"]
    if "stages" in results:
        layers = settings["layers_per_stage"]
        tokens = sum(epoch["tokens"] for stage in results["stages"] for epoch in stage["epochs"])
        training = sum(stage["seconds"] for stage in results["stages"])
        shares = list(final["exit_share"].values())
        entered = sum(number * share for number, share in enumerate(shares))  # stages that a token goes through
        trained, stages = layers, f"{final['stages_kept']} of {len(results['stages'])}"
    else:
        tokens = sum(epoch["tokens"] for epoch in results["epochs"])
        training = sum(epoch["seconds"] for epoch in results["epochs"])
        layers, entered, trained, stages = 0, 0.0, base["layers"], "-"
    test, base_test = final["all_token_test_ppl"], final["base_test_ppl"]
    base_pass = final["base_pass_seconds"]
    return {
        "name": name,
        "folder": folder.name,
        "epochs": settings["epochs"],
        "val_ppl": final["all_token_val_ppl"],
        "val_change": final["all_token_val_ppl"] / base["val_ppl"],
        "test_ppl": test,
        "test_change": test / base_test if test is not None else None,
        "base_val_ppl": base["val_ppl"],
        "base_test_ppl": base_test,
        "seconds": base_pass + training,
        "base_pass_seconds": base_pass,
        "training_seconds": training,
        "process_seconds": _process_seconds(folder, final),
        "trained_tokens": tokens,
        "trained_layer_tokens": tokens * trained,
        "layers_per_token": base["layers"] + layers * entered,
        "stages": stages,
        "settings": settings,
    }


def _process_seconds(folder: Path, final: dict[str, Any]) -> float | None:
    """From start to end, with the base pass; None for a run that was interrupted, which knows its last part only."""
    log = folder / "metrics.jsonl"
    if log.is_file() and any('"event": "resume"' in line for line in log.read_text(encoding="utf-8").splitlines()):
        return None
    return final["seconds"] + (final["base_pass_seconds"] if final["base_pass_reused"] else 0.0)


def base_row(row: Row) -> Row:
    """The base, as the run of ``row`` has measured it: nothing is trained."""
    nothing = dict.fromkeys(row, None)
    return {
        **nothing,
        "name": "base",
        "val_ppl": row["base_val_ppl"],
        "val_change": 1.0,
        "test_ppl": row["base_test_ppl"],
        "test_change": None if row["base_test_ppl"] is None else 1.0,
        "seconds": 0.0,
        "trained_tokens": 0,
        "trained_layer_tokens": 0,
    }


# --- equal cost -----------------------------------------------------------------------------------------------------


def best_within(rows: Sequence[Row], cost: str, budget: float) -> dict[str, Row]:
    """By name: the run with the lowest validation perplexity among those whose ``cost`` is at most ``budget``.

    Names without such a run are absent: nothing is read between the points that were measured.
    """
    best: dict[str, Row] = {}
    for row in rows:
        if row[cost] <= budget and (row["name"] not in best or row["val_ppl"] < best[row["name"]]["val_ppl"]):
            best[row["name"]] = row
    return best


def equal_cost_table(rows: Sequence[Row], cost: str) -> str:
    """A line for each cost that some run has had: what every method has reached by then."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for budget in sorted({row[cost] for row in rows}):
        best = best_within(rows, cost, budget)
        winner = min(best.values(), key=lambda r: r["val_ppl"])["name"]
        cells = [
            "-" if n not in best else f"**{best[n]['val_ppl']:.4f}**" if n == winner else f"{best[n]['val_ppl']:.4f}"
            for n in names
        ]
        lines.append([COLUMNS[cost][1].format(budget), *cells])
    return markdown_table([f"{COLUMNS[cost][0]}, at most", *names], lines)


def verdict(rows: Sequence[Row], cost: str, reference: str) -> str:
    """A sentence: who is best within what the longest run of ``reference`` has cost, and how ``reference`` stands."""
    longest = max((r for r in rows if r["name"] == reference), key=lambda r: r[cost])
    best = best_within(rows, cost, longest[cost])
    order = sorted(best.values(), key=lambda r: r["val_ppl"])
    budget = COLUMNS[cost][1].format(longest[cost])
    absent = [n for n in dict.fromkeys(r["name"] for r in rows) if n not in best]
    said = (
        f"At equal {COLUMNS[cost][0]} (at most {budget}, what {reference} has taken) the best is "
        f"**{order[0]['name']}**: validation perplexity {order[0]['val_ppl']:.4f}"
    )
    if len(order) > 1:
        said += "; then " + ", ".join(f"{r['name']} {r['val_ppl']:.4f}" for r in order[1:])
    return said + (f". No run within it: {', '.join(absent)}." if absent else ".")


# --- files ----------------------------------------------------------------------------------------------------------


def write_tables(folder: Path, command: str, rows: Sequence[Row]) -> str:
    """``comparison.json`` and ``comparison.csv``; returns the table as Markdown."""
    write_json(folder / RECORD, {"command": command, "rows": list(rows)})
    text = io.StringIO()
    names = [name for name in rows[0] if name != "settings"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(folder / "comparison.csv", text.getvalue())
    return markdown_table(
        [heading for heading, _ in COLUMNS.values()],
        [["-" if r[n] is None else form.format(r[n]) for n, (_, form) in COLUMNS.items()] for r in rows],
    )


def write_report(folder: Path, parts: Sequence[str]) -> Path:
    """``report.md``: the parts, a blank line between them."""
    path = folder / "report.md"
    atomic_write_text(path, "\n\n".join(parts) + "\n")
    return path


def plot_lines(
    path: Path, rows: Sequence[Row], panels: Sequence[tuple[str, str, bool]], *, base_ppl: float | None = None
) -> str:
    """Validation perplexity of each name as a line, a panel for each ``(key, axis label, logarithmic)``.

    A point for every run, joined in the order of the panel's quantity; the base as a horizontal line.

    Returns:
        The Markdown that shows it.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure = Figure(figsize=(5.5 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(row["name"] for row in rows))
    for panel, (key, label, logarithmic) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            points = sorted((row[key], row["val_ppl"]) for row in rows if row["name"] == name)
            panel.plot(*zip(*points, strict=True), marker="osD^vP*X"[number % 8], color=f"C{number % 10}", label=name)
        if base_ppl is not None:
            panel.axhline(base_ppl, color="0.5", linestyle="--", label="base")
        panel.set(xlabel=label)
        values = [row[key] for row in rows]
        if logarithmic and min(values) > 0 and max(values) > 3 * min(values):
            panel.set_xscale("log", subs=(2, 5))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_minor_formatter(EngFormatter(sep="") if max(values) < 30 * min(values) else NullFormatter())
        elif max(values) >= 10_000:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    axes[0].set(ylabel="perplexity over all validation tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return f"![{path.stem}]({path.name})"
