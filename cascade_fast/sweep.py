"""``python -m cascade_fast.sweep``: a cascade for every combination of some settings, and one report of them all.

Finished runs are kept and interrupted ones go on, so the same command, or one with more values, adds what is missing.
Runs with the same base pass share it. See ``docs/compare.md``.
"""

import argparse
import sys
from pathlib import Path

from cascade_fast.command_line import run_command, settings_parser, together
from cascade_fast.comparison.grid import GRID, make_grid

DESCRIPTION = (
    "Train a cascade for every combination of the values given, and compare them. Takes every flag of the trainer; "
    "hard-ratio, criterion, layers-per-stage, lr and stage-kind take several values. The same command again goes on "
    "where it was."
)


def sweep_parser() -> argparse.ArgumentParser:
    return settings_parser("python -m cascade_fast.sweep", DESCRIPTION, several=GRID)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of the trainer."""
    given = vars(sweep_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)

    def work() -> None:
        grid = make_grid(given, settings_file)
        # Imported here: a mistake in the flags is answered before torch is loaded.
        from cascade_fast.comparison.sweep import run_sweep

        assert grid[0].out is not None
        with together():
            run_sweep(Path(grid[0].out).parent, grid)

    return run_command(work, debug=debug, again="the same command", several=True)


if __name__ == "__main__":
    sys.exit(main())
