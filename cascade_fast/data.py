"""``python -m cascade_fast.data``: what a run would be trained on, before it is trained.

Takes the flags of ``python -m cascade_fast.train``; needs the base's tokenizer, but no weights.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cascade_fast.command_line import run_command, settings_parser
from cascade_fast.input_checks import InputError
from cascade_fast.settings import RunSettings, make_settings

SHOW = 3  # sequences


def build_parser() -> argparse.ArgumentParser:
    """The trainer's flags, and what to show."""
    parser = settings_parser(
        "python -m cascade_fast.data",
        "Look at what a run would be trained on: how much of the text is used and what is left out, the sequences of "
        "each split and their lengths, and the first ones token by token. Takes the flags of train; needs the base's "
        "tokenizer, but no weights.",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--show",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"sequences of the training split to print (default: {SHOW})",
    )
    shown.add_argument("--json", metavar="FILE", default=argparse.SUPPRESS, help="write the counts there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the settings."""
    given = vars(build_parser().parse_args(argv))
    debug, settings_file = given.pop("debug", False), given.pop("config", None)
    show, json_file = given.pop("show", SHOW), given.pop("json", None)

    def work() -> None:
        settings = make_settings(given, settings_file)
        _check(show, json_file)
        _look(settings, show, json_file)

    return run_command(work, debug=debug)


def _check(show: int, json_file: str | None) -> None:
    if show < 0:
        raise InputError(f"show: {show}; must be at least 0")
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise InputError(f"json: {json_file!r}; its folder does not exist")


def _look(settings: RunSettings, show: int, json_file: str | None) -> None:
    # Imported here: a mistake in the flags is answered before torch is loaded.
    from cascade_fast.base.model import find_tokenizer
    from cascade_fast.base.texts import load_sequences
    from cascade_fast.reporting.data_view import data_record, say_data
    from cascade_fast.runtime.console import quiet_libraries
    from cascade_fast.runtime.files import atomic_write_text

    quiet_libraries()
    tokenizer: Any = find_tokenizer(settings)
    sequences = load_sequences(settings, tokenizer)
    say_data(sequences, tokenizer, settings.seq_len, show)
    if json_file is not None:
        atomic_write_text(Path(json_file), json.dumps(data_record(sequences), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
