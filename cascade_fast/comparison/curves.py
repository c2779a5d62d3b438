"""The plots of a comparison: perplexity over what varies or what it has cost."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.ticker import EngFormatter, NullFormatter

from cascade_fast.comparison.runs import Row
from cascade_fast.runtime.files import atomic_write


def plot_lines(
    path: Path,
    rows: Sequence[Row],
    panels: Sequence[tuple[str, str, bool]],
    *,
    base: Row | None = None,
    splits: Sequence[str] = ("val",),
    front: bool = False,
) -> str:
    """Perplexity of each name as a line, a panel for each ``(key, axis label, logarithmic)``.

    A point for every run, joined in the order of the panel's quantity; the base as a horizontal line.

    Args:
        splits: ``val`` and ``test``, a row of panels each; none for test where some run has none.
        front: only the points are joined that are better than every one to their left.

    Returns:
        The Markdown that shows it.
    """
    splits = [split for split in splits if all(row[f"{split}_ppl"] is not None for row in rows)]
    figure = Figure(figsize=(5.5 * len(panels), 5.2 * len(splits)), layout="constrained")
    axes = figure.subplots(len(splits), len(panels), squeeze=False, sharey="row")
    names = list(dict.fromkeys(row["name"] for row in rows))
    places = itertools.product(splits, panels)
    for panel, (split, (key, label, logarithmic)) in zip(axes.flat, places, strict=True):
        ppl = f"{split}_ppl"
        for number, name in enumerate(names):
            points = sorted((row[key], row[ppl]) for row in rows if row["name"] == name)
            marker, color = "osD^vP*X"[number % 8], f"C{number % 10}"
            panel.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=color, label=name)
            joined = [p for i, p in enumerate(points) if not front or all(p[1] < q[1] for q in points[:i])]
            panel.plot(*zip(*joined, strict=True), color=color)
        if base is not None:
            panel.axhline(base[ppl], color="0.5", linestyle="--", label="base")
        panel.set(xlabel=label)
        values = [row[key] for row in rows]
        if logarithmic and min(values) > 0 and max(values) > 3 * min(values):
            panel.set_xscale("log", subs=(2, 5))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_minor_formatter(EngFormatter(sep="") if max(values) < 30 * min(values) else NullFormatter())
        elif max(values) >= 10_000:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    for panel, split in zip(axes[:, 0], splits, strict=True):
        panel.set(ylabel=f"perplexity over all {'validation' if split == 'val' else split} tokens")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return f"![{path.stem}]({path.name})"
