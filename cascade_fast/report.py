"""``python -m cascade_fast.report RUN``: writes the report of a finished run again, from its folder alone."""

import argparse
import sys
from pathlib import Path

from cascade_fast.command_line import run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.report",
        description="Write the report of a finished run again: report.md, its plots, and report.html.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: _run(asked), debug=asked.debug)


def _run(asked: argparse.Namespace) -> int:
    # Imported here: --help is answered before torch is loaded.
    from cascade_fast.reporting.report import write_report
    from cascade_fast.runtime.console import say

    path = write_report(Path(asked.run))
    say(f"page: {path.with_suffix('.html')}")
    say(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
