"""``python -m cascade_fast.evaluate RUN``: base, + stage 1, + stages 1-2, ... on a text, with what each costs."""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from cascade_fast.command_line import add_model_arguments, add_run_argument, run_command
from cascade_fast.input_checks import InputError
from cascade_fast.settings import RESUME_MAY_CHANGE, SPLITS, make_settings, saved_settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.evaluate",
        description="Measure a cascade: perplexity and accuracy over all tokens, exits, layers and FLOPs that ran.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--split", default="val", choices=SPLITS, help="blocks of the run's own text")
    text.add_argument("--dataset", metavar="TEXT", help="another text instead, all of it; as --dataset of training")
    text.add_argument("--text-columns", metavar="TEXT", nargs="+", help="of --dataset; as in training")
    text.add_argument("--text-template", metavar="TEXT", help="of --dataset; as in training")
    text.add_argument("--seq-len", type=int, metavar="N", help="tokens in a block (default: that of training)")
    text.add_argument("--blocks", type=int, metavar="N", help="the first N blocks only")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="write everything there")
    out.add_argument("--csv", metavar="FILE", help="write the table there")
    out.add_argument(
        "--sweep-threshold",
        metavar="FILE",
        help="move stage 1's threshold from closed to open; the curve goes to FILE (csv) and beside it as png",
    )
    out.add_argument("--sweep-points", type=int, default=9, metavar="N", help="points of that curve")
    how = parser.add_argument_group("how")
    how.add_argument("--no-flops", action="store_true", help="do not count FLOPs: half the time")
    how.add_argument("--batch-tokens", type=int, default=1024, metavar="N", help="tokens of a forward pass")
    add_model_arguments(how)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: _run(asked), debug=asked.debug)


def _check(asked: argparse.Namespace) -> None:
    for name, least in (("batch_tokens", 1), ("blocks", 1), ("seq_len", 2), ("sweep_points", 2)):
        value = getattr(asked, name)
        if value is not None and value < least:
            raise InputError(f"{name}: {value}; must be at least {least}")
    for name in ("text_columns", "text_template"):
        if getattr(asked, name) is not None and asked.dataset is None:
            raise InputError(f"{name}: {getattr(asked, name)!r}; is of --dataset, which is not given")
    for name in ("json", "csv", "sweep_threshold"):
        path = getattr(asked, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{name}: {path!r}; its folder does not exist")


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    from cascade_fast.model.loading import load_model
    from cascade_fast.model.measuring import evaluate_cascade, sweep_threshold
    from cascade_fast.runtime.compute import dtype_name
    from cascade_fast.runtime.console import say

    model, tokenizer = load_model(asked.run, device=asked.device, dtype=asked.dtype, base_path=asked.base_path)
    blocks, source = _blocks(asked, model.config, tokenizer)
    if asked.sweep_threshold is not None and len(model.stages) == 0:
        raise InputError("sweep_threshold: this cascade kept no stage, so there is no threshold to move")
    seq_len = blocks.shape[1] - 1
    say(f"{asked.run}: {source}, {len(blocks):,} blocks of {seq_len} tokens, {model.device}, {dtype_name(model.dtype)}")
    how = {"batch_tokens": asked.batch_tokens}
    results = {
        "run": str(asked.run),
        "data": {"source": source, "blocks": len(blocks), "seq_len": seq_len, "tokens": len(blocks) * seq_len},
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        "thresholds": model.config.thresholds,
        **evaluate_cascade(model, blocks, count_flops=not asked.no_flops, **how),
    }
    _say(results)
    if asked.sweep_threshold is not None:
        results["sweep"] = sweep_threshold(model, blocks, points=asked.sweep_points, **how)
        _write_sweep(Path(asked.sweep_threshold), results)
    _write(asked, results)
    return 0


def _blocks(asked: argparse.Namespace, config: Any, tokenizer: Any) -> tuple[Any, str]:
    """The token blocks (B, S + 1) asked for, and what they are."""
    from cascade_fast.base.texts import load_blocks, text_blocks

    settings = {n: value for n, value in saved_settings(config.settings).items() if n not in RESUME_MAY_CHANGE}
    if asked.dataset is None and not config.settings:
        raise InputError("dataset: not given, and this cascade does not know what it was trained on")
    if asked.seq_len is not None:
        settings["seq_len"] = asked.seq_len
    if asked.dataset is not None:
        settings |= {n: getattr(asked, n) for n in ("dataset", "text_columns", "text_template")}
    text, longest = make_settings(settings), config.max_position_embeddings
    if text.seq_len > longest:
        raise InputError(f"seq_len: {text.seq_len}; the base has {longest} positions")
    if asked.dataset is None:
        blocks, source = load_blocks(text, tokenizer).ids[asked.split], f"{text.dataset}, {asked.split}"
    else:
        blocks, source = text_blocks(text, tokenizer, asked.blocks), text.dataset
    if len(blocks) == 0:
        raise InputError(f"split: {asked.split!r}; the run has no such blocks")
    return blocks[: asked.blocks], source


# --- what is said and written ---------------------------------------------------------------------------------------


def _say(results: dict[str, Any]) -> None:
    """Three tables, each narrow enough for a terminal of 80 columns with two stages."""
    from cascade_fast.runtime.console import say_table

    rows, stages = results["rows"], len(results["thresholds"])
    say_table(
        "all tokens, each at its own exit",
        ["exits", "perplexity", "vs base", "95 % interval", "accuracy"],
        [[row["name"], _show(row["perplexity"]), *_difference(row), f"{row['accuracy']:.2%}"] for row in rows],
    )
    left_at = ["base", *(f"stage {n}" for n in range(1, stages + 1))]
    say_table(
        "\nshare of tokens that leave at each exit; layers and GFLOP a token",
        ["exits", *left_at, "layers", "GFLOP", "seconds"],
        [
            [
                row["name"],
                *(f"{share:.1%}" for share in row["exit_share"]),
                f"{row['layers_per_token']:.2f}",
                "" if row["flops_per_token"] is None else f"{row['flops_per_token'] / 1e9:.3f}",
                f"{row['seconds']:.2f}",
            ]
            for row in rows
        ],
    )
    if results["doors"]:
        say_table(
            "\nperplexity of easy tokens, which leave, and of hard ones: had they left here, and where they do",
            ["at exit", "easy", "perplexity", "hard", "had they left", "where they do"],
            [[_show(value) for value in door.values()] for door in results["doors"]],
        )


def _difference(row: dict[str, Any]) -> tuple[str, str]:
    """To the base's perplexity, and its interval; nothing for the base itself, where one block has no interval, or
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


def _write(asked: argparse.Namespace, results: dict[str, Any]) -> None:
    from cascade_fast.runtime.console import say
    from cascade_fast.runtime.files import atomic_write_text

    if asked.csv is not None:
        atomic_write_text(Path(asked.csv), _csv(results["rows"]))
        say(f"table: {asked.csv}")
    if asked.json is not None:
        for row in results.get("sweep", []):
            row["threshold"] = None if math.isinf(row["threshold"]) else row["threshold"]  # JSON has no infinity
        atomic_write_text(Path(asked.json), json.dumps(results, indent=2, allow_nan=False) + "\n")
        say(f"everything: {asked.json}")


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


def _write_sweep(path: Path, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    from cascade_fast.runtime.console import say
    from cascade_fast.runtime.files import atomic_write, atomic_write_text

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


if __name__ == "__main__":
    sys.exit(main())
