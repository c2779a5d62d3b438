"""The tables of a comparison: its runs side by side, and who is ahead at equal cost."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cascade_fast.comparison.runs import RECORD, Row
from cascade_fast.runtime.console import markdown_table
from cascade_fast.runtime.files import atomic_write_text, write_json

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
