"""``python -m cascade_fast.evaluate RUN``: base, + stage 1, + stages 1-2, ... on a text, with what each costs."""

import argparse
import sys
from pathlib import Path

from cascade_fast.command_line import add_model_arguments, add_run_argument, run_command, together
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.processes import Processes
from cascade_fast.settings import LOSS_ON, READ

# Settings of training that say how --dataset is read.
TEXT_FLAGS = (
    "text_columns", "text_template", "prompt_template", "completion_template", "encoding", "chat_template", "loss_on",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.evaluate",
        description="Measure a cascade: perplexity, accuracy and exits over all tokens, layers and FLOPs that ran.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--split", default="val", choices=READ, help="part of the run's own text, or its general text")
    text.add_argument("--dataset", metavar="TEXT", help="another text instead, all of it; as --dataset of training")
    text.add_argument("--text-columns", metavar="TEXT", nargs="+", help="of --dataset; as in training")
    for name in ("text", "prompt", "completion"):
        text.add_argument(f"--{name}-template", metavar="TEXT", help="of --dataset; as in training")
    text.add_argument("--encoding", metavar="TEXT", help="of --dataset; as in training (default: utf-8)")
    that = "of --dataset; as in training (default: that of training)"
    text.add_argument("--chat-template", metavar="FILE", help=that)
    text.add_argument("--loss-on", choices=LOSS_ON, help=that)
    text.add_argument("--seq-len", type=int, metavar="N", help="most tokens in a sequence (default: that of training)")
    text.add_argument("--blocks", type=int, metavar="N", help="the first N sequences only")
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
    return run_command(lambda: _run(asked), debug=asked.debug, several=True)


def _check(asked: argparse.Namespace) -> None:
    for name, least in (("batch_tokens", 1), ("blocks", 1), ("seq_len", 2), ("sweep_points", 2)):
        value = getattr(asked, name)
        if value is not None and value < least:
            raise InputError(f"{name}: {value}; must be at least {least}")
    for name in TEXT_FLAGS:
        if getattr(asked, name) is not None and asked.dataset is None:
            raise InputError(f"{name}: {getattr(asked, name)!r}; is of --dataset, which is not given")
    for name in ("json", "csv", "sweep_threshold"):
        path = getattr(asked, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{name}: {path!r}; its folder does not exist")


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    with together() as these:
        return _evaluate(asked, these)


def _evaluate(asked: argparse.Namespace, these: Processes) -> int:
    from cascade_fast.model.evaluation_text import evaluation_text
    from cascade_fast.model.loading import load_model
    from cascade_fast.model.measuring import sweep_threshold
    from cascade_fast.reporting import evaluation
    from cascade_fast.runtime.compute import dtype_name
    from cascade_fast.runtime.console import say

    text = {name: value for name in TEXT_FLAGS if (value := getattr(asked, name)) is not None}
    which = {"split": asked.split, "dataset": asked.dataset, "seq_len": asked.seq_len, "limit": asked.blocks}
    with these.first_before_others():
        model, tokenizer = load_model(asked.run, device=asked.device, dtype=asked.dtype, base_path=asked.base_path)
        sequences, source = evaluation_text(model.config, tokenizer, **which, **text)
    if asked.sweep_threshold is not None and len(model.stages) == 0:
        raise InputError("sweep_threshold: this cascade kept no stage, so there is no threshold to move")
    of = evaluation.describe_text(sequences)
    say(f"{asked.run}: {source}, {of}, {model.device}, {dtype_name(model.dtype)}")
    how = {"batch_tokens": asked.batch_tokens}
    results = evaluation.evaluate_run(asked.run, model, sequences, source, count_flops=not asked.no_flops, **how)
    evaluation.say_tables(results)
    if asked.sweep_threshold is not None:
        results["sweep"] = sweep_threshold(model, sequences, points=asked.sweep_points, **how)
        if these.first:
            evaluation.write_sweep(Path(asked.sweep_threshold), results)
    if asked.csv is not None and these.first:
        evaluation.write_table(Path(asked.csv), results)
    if asked.json is not None and these.first:
        evaluation.write_results(Path(asked.json), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
