"""``python -m cascade_fast.train``: trains a cascade. Every flag is a setting of ``RunSettings``."""

import argparse
import sys

from cascade_fast.command_line import run_command, settings_parser, together
from cascade_fast.settings import RunSettings, make_settings

DESCRIPTION = (
    "Train a cascade: new layers on the hard tokens of a frozen language model. With no flags: SmolLM2-135M-Instruct "
    "on CPython's reference text."
)


def build_parser() -> argparse.ArgumentParser:
    return settings_parser("python -m cascade_fast.train", DESCRIPTION)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the settings or a loss that is not finite, 130 and 143 interrupted."""
    given = vars(build_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)
    again = "the same command with --resume auto"
    return run_command(lambda: _train(make_settings(given, settings_file)), debug=debug, again=again, several=True)


def _train(settings: RunSettings) -> None:
    # Imported here: a mistake in the flags is answered before torch is loaded.
    from cascade_fast.cascade import run_cascade
    from cascade_fast.reporting.report import add_samples
    from cascade_fast.training.messages import say_next

    with together() as these:
        folder = run_cascade(settings).path
        if these.first:
            add_samples(folder, settings.device)
            say_next(folder)


if __name__ == "__main__":
    sys.exit(main())
