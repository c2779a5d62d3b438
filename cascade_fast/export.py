"""``python -m cascade_fast.export RUN --to FOLDER``: one second look as a plain model or a LoRA adapter."""

import argparse
import sys
from pathlib import Path

from cascade_fast.command_line import add_run_argument, run_command
from cascade_fast.settings import DTYPES

FORMATS = ("merged", "peft")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.export",
        description="Write a cascade of one second look as what other programs load: the model that it is where every "
        "token enters the stage, with as many layers as its base. This package is not needed to run it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    parser.add_argument("--to", metavar="FOLDER", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="merged",
        help="merged: a whole model of the base's own class, for transformers, vLLM, llama.cpp; peft: the LoRA adapter "
        "alone, of a stage trained with --adapter lora",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the weights; auto: what the base is stored in for merged, the adapter for peft",
    )
    parser.add_argument("--base-path", metavar="TEXT", help="where the base is now, if not where it was in training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: _run(asked), debug=asked.debug)


def _run(asked: argparse.Namespace) -> int:
    from cascade_fast.model.export import export
    from cascade_fast.runtime.console import quiet_libraries, say

    quiet_libraries()
    lines = export(asked.run, Path(asked.to), format=asked.format, dtype=asked.dtype, base_path=asked.base_path)
    for line in lines:
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
