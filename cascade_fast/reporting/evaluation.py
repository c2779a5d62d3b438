"""What ``python -m cascade_fast.evaluate`` says and writes: tables on the console, JSON, CSV, the sweep's plot."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no display, no global state

from cascade_fast.base.sequences import Sequences
from cascade_fast.model.measuring import MERGED, evaluate_cascade
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.runtime.console import say, say_table
from cascade_fast.runtime.files import atomic_write, atomic_write_text


def evaluate_run(
    run: str, model: CascadeForCausalLM, sequences: Sequences, source: str, *, batch_tokens: int, count_flops: bool
) -> dict[str, Any]:
    """:func:`~cascade_fast.model.measuring.evaluate_cascade`, and what it is of: the cascade at ``run`` on
    ``sequences``, which are of ``source``."""
    return {
        "run": str(run),
        "data": {
            "source": source,
            "sequences": len(sequences),
            "longest": sequences.longest,
            "tokens": sequences.tokens,
            "labelled": sequences.labels,
        },
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        "thresholds": model.config.thresholds,
        **evaluate_cascade(model, sequences, batch_tokens=batch_tokens, count_flops=count_flops),
    }


def describe_text(sequences: Sequences) -> str:
    """For people: how long, and how much of it is measured."""
    labels, tokens = sequences.labels, sequences.tokens
    labelled = "all" if labels == tokens else f"{labels:,} ({labels / tokens:.1%})"
    longest = f"of {sequences.longest}" if len(sequences) * sequences.longest == tokens else "of their own lengths"
    return f"{len(sequences):,} sequences {longest}, {tokens:,} tokens, {labelled} with a label"


def say_tables(results: dict[str, Any]) -> None:
    """Three tables, each narrow enough for a terminal of 80 columns with two stages."""
    rows, stages = results["rows"], len(results["thresholds"])
    context = results["data"]["labelled"] < results["data"]["tokens"]
    of, with_context = ("tokens with a label", ", context included") if context else ("all tokens", "")
    say_table(
        f"{of}, each at its own exit",
        ["exits", "perplexity", "vs base", "95 % interval", "accuracy"],
        [[row["name"], _show(row["perplexity"]), *_difference(row), f"{row['accuracy']:.2%}"] for row in rows],
    )
    left_at = ["base", *(f"stage {n}" for n in range(1, stages + 1))]
    say_table(
        f"\nshare of {of.removeprefix('all ')} that leave at each exit; layers and GFLOP a token{with_context}",
        ["exits", *left_at, "layers", "GFLOP", "seconds"],
        [
            [
                row["name"],
                *(f"{share:.1%}" for share in row["exit_share"]),
                f"{row['layers_per_token']:.2f}",
                "" if row["flops_per_token"] is None else f"{row['flops_per_token'] / 1e9:.3f}",
                "" if row["seconds"] is None else f"{row['seconds']:.2f}",
            ]
            for row in rows
        ],
    )
    if rows[-1]["name"] == MERGED:
        say("merged: the plain model of base and stage, every token in the stage; as large as the base")
    if results["exits"]:
        say_table(
            "\nperplexity of easy tokens, which leave, and of hard ones: had they left here, and where they do",
            ["at exit", "easy", "perplexity", "hard", "had they left", "where they do"],
            [[_show(value) for value in row.values()] for row in results["exits"]],
        )


def _difference(row: dict[str, Any]) -> tuple[str, str]:
    """To the base's perplexity, and its interval; nothing for the base itself, where one sequence has no interval, or
    where a loss is NaN."""
    if row["name"] == "base":
        return "", ""
    if row["difference"] is None:
        return "-", ""
    if row["difference_low"] is None:
        return f"{row['difference']:+.4f}", ""
    return f"{row['difference']:+.4f}", f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}"


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_table(path: Path, results: dict[str, Any]) -> None:
    """The rows as CSV."""
    atomic_write_text(path, _csv(results["rows"]))
    say(f"table: {path}")


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Everything as JSON."""
    for row in results.get("sweep", []):
        row["threshold"] = None if math.isinf(row["threshold"]) else row["threshold"]  # JSON has no infinity
    atomic_write_text(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    say(f"everything: {path}")


def _csv(rows: list[dict[str, Any]]) -> str:
    """One line a row; the exit shares in columns of their own."""
    flat = [
        {name: value for name, value in row.items() if name != "exit_share"}
        | {f"exit_{n}": share for n, share in enumerate(row["exit_share"])}
        for row in rows
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def write_sweep(path: Path, results: dict[str, Any]) -> None:
    """The sweep's curve as CSV, and beside it as PNG."""
    atomic_write_text(path, _csv(results["sweep"]))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    cost = [row["flops_per_token"] / 1e9 for row in results["sweep"]]
    axes.plot(cost, [row["perplexity"] for row in results["sweep"]], "o-", label="stage 1's threshold moved")
    (trained,) = (row for row in results["sweep"] if row["trained"])
    axes.plot(trained["flops_per_token"] / 1e9, trained["perplexity"], "C3*", markersize=14, label="as trained")
    axes.set(xlabel="GFLOP a token, counted", ylabel="perplexity over all tokens", title=results["data"]["source"])
    axes.legend()
    image = path.with_suffix(".png")
    atomic_write(image, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    say(f"curve: {path}, {image}")
