"""The tables of a comparison: its runs side by side, who is best, and who is ahead at equal cost."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cascade_fast.comparison.runs import RECORD, Row, read_record
from cascade_fast.runtime.console import format_count, markdown_table
from cascade_fast.runtime.files import atomic_write_text, write_json
from cascade_fast.runtime.run_folder import REPORT

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # what the tables show, in order: heading and format
    "name": ("run", str),
    "variant": ("trained with", str),
    "epochs": ("epochs", str),
    "val_ppl": ("validation ppl", "{:.4f}".format),
    "val_change": ("x base", "{:.4f}".format),
    "test_ppl": ("test ppl", "{:.4f}".format),
    "test_change": ("x base", "{:.4f}".format),
    "general_rise": ("rise on other text, nats", "{:+.4f}".format),
    "trained_parameters": ("trained parameters", format_count),
    "peak_bytes": ("peak memory, MiB", lambda peak: f"{peak / 2**20:,.0f}"),
    "seconds": ("seconds", "{:.1f}".format),
    "base_pass_seconds": ("of them base pass", "{:.1f}".format),
    "process_seconds": ("whole process", "{:.1f}".format),
    "trained_tokens": ("trained tokens", "{:,}".format),
    "trained_layer_tokens": ("trained layer-tokens", "{:,}".format),
    "layers_per_token": ("layers per token", "{:.2f}".format),
    "merged": ("plain model", lambda merged: "yes" if merged else "no"),
    "stages": ("stages kept", str),
}
BEST_COLUMNS = (
    "name", "variant", "epochs", "val_ppl", "val_change", "test_ppl", "test_change", "general_rise",
    "trained_parameters", "peak_bytes", "seconds", "layers_per_token", "merged",
)  # fmt: skip


# --- who is best ----------------------------------------------------------------------------------------------------


def best_runs(rows: Sequence[Row]) -> list[Row]:
    """Of each name the run with the lowest validation perplexity, the best first."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["name"] not in best or row["val_ppl"] < best[row["name"]]["val_ppl"]:
            best[row["name"]] = row
    return sorted(best.values(), key=lambda r: r["val_ppl"])


def winner(rows: Sequence[Row], bar: str) -> str:
    """Which run is best on validation, and what it is on test; then the same of the best run of ``bar``, if there is
    one and it is another. Test chooses nothing."""
    best = best_runs(rows)
    first = best[0]
    said = f"Validation chooses **{first['name']}** ({_described(first)}) of {len(rows)} results: {_numbers(first)}."
    if first["val_change"] >= 1:
        said = f"No result is better than the base on validation; the best of {len(rows)} is {_numbers(first)}."
    theirs = next((row for row in best if row["name"] == bar), None)
    if theirs is not None and theirs is not first:
        said += (
            f" The best {bar} of {sum(row['name'] == bar for row in rows)} is that with {_described(theirs)}: "
            f"{_numbers(theirs)}."
        )
    return said


def _described(row: Row) -> str:
    return f"{row['variant']}, {row['epochs']} epoch{'' if row['epochs'] == 1 else 's'}"


def _numbers(row: Row) -> str:
    """Perplexities and cost, in words."""
    said = f"validation perplexity {row['val_ppl']:.4f} ({row['val_change']:.4f} x base)"
    if row["test_ppl"] is not None:
        said += f", test {row['test_ppl']:.4f} ({row['test_change']:.4f} x base)"
    return f"{said}, {row['seconds']:.1f} seconds"


# --- equal cost -----------------------------------------------------------------------------------------------------


def best_within(rows: Sequence[Row], cost: str, budget: float) -> dict[str, Row]:
    """By name: the run with the lowest validation perplexity among those whose ``cost`` is at most ``budget``, the best
    first.

    Names without such a run are absent: nothing is read between the points that were measured.
    """
    return {row["name"]: row for row in best_runs([row for row in rows if row[cost] <= budget])}


def equal_cost_table(rows: Sequence[Row], cost: str) -> str:
    """A line for each cost of a run that was better than all of its name before: what every method has reached by
    then."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines, before = [], dict[str, Row]()
    for budget in sorted({row[cost] for row in rows}):
        best = best_within(rows, cost, budget)
        if best == before:
            continue
        before, winning = best, next(iter(best))
        cells = [
            "-" if n not in best else f"**{best[n]['val_ppl']:.4f}**" if n == winning else f"{best[n]['val_ppl']:.4f}"
            for n in names
        ]
        lines.append([COLUMNS[cost][1](budget), *cells])
    return markdown_table([f"{COLUMNS[cost][0]}, at most", *names], lines)


def verdict(rows: Sequence[Row], cost: str, reference: str) -> str:
    """A sentence: who is best within what the longest run of ``reference`` has cost, and how the others stand."""
    longest = max((r for r in rows if r["name"] == reference), key=lambda r: r[cost])
    best, *others = best_within(rows, cost, longest[cost]).values()
    budget = COLUMNS[cost][1](longest[cost])
    said = (
        f"At equal {COLUMNS[cost][0]} (at most {budget}, what {reference} has taken) the best is "
        f"**{best['name']}**: validation perplexity {best['val_ppl']:.4f}"
    )
    if others:
        said += "; then " + ", ".join(f"{r['name']} {r['val_ppl']:.4f}" for r in others)
    found = {best["name"], *(r["name"] for r in others)}
    absent = [n for n in dict.fromkeys(r["name"] for r in rows) if n not in found]
    return said + (f". No run within it: {', '.join(absent)}." if absent else ".")


# --- files ----------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, command: str, rows: Sequence[Row]) -> None:
    """``comparison.json`` and ``comparison.csv``. ``rows``: the base's first."""
    write_json(folder / RECORD, {**read_record(folder), "command": command, "rows": list(rows)})
    text = io.StringIO()
    names = [name for name in rows[0] if name != "settings"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(folder / "comparison.csv", text.getvalue())


def runs_table(rows: Sequence[Row], columns: Sequence[str], *, mark_best: bool = False) -> str:
    """A line for each run, as Markdown, with the ``columns`` that some run has a value for. ``mark_best``: those that
    are the best of their name stand in bold."""
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    lines = []
    for row in rows:
        cells = ["-" if row[name] is None else COLUMNS[name][1](row[name]) for name in shown]
        lines.append([f"**{cells[0]}**" if mark_best and row["best"] else cells[0], *cells[1:]])
    return markdown_table([COLUMNS[name][0] for name in shown], lines)


def write_report(folder: Path, parts: Sequence[str]) -> None:
    """``report.md``: the parts, a blank line between them."""
    atomic_write_text(folder / REPORT, "\n\n".join(parts) + "\n")
