"""``python -m cascade_fast.train``: trains a cascade. Every flag is a setting of ``config.RunConfig``."""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from cascade_fast.config import ConfigError, RunConfig, explain, make_config
from cascade_fast.input_checks import one_line, suggest

DESCRIPTION = (
    "Train a cascade: new layers on the hard tokens of a frozen language model. With no flags: SmolLM2-135M-Instruct "
    "on CPython's reference text."
)


class SettingsParser(argparse.ArgumentParser):
    """Says of an unknown flag which one may be meant, other trainers' names included."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            hints = [hint for word in rest if word.startswith("--") and (hint := self._hint(word))]
            self.error(f"unrecognized arguments: {' '.join(rest)}" + "".join(hints))
        return found

    def _hint(self, word: str) -> str:
        flag = word.partition("=")[0]
        known = {action.dest for action in self._actions}
        name = suggest(flag.removeprefix("--"), known - {"help"})
        if name is None:
            return ""
        means = f" ({explain(name)})" if name in RunConfig.__dataclass_fields__ else ""
        return f"; {flag}: did you mean --{name.replace('_', '-')}{means}?"


def build_parser(
    prog: str = "python -m cascade_fast.train", description: str = DESCRIPTION, several: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The command line, one flag for each setting, in the settings' groups. ``several``: those that take a list."""
    parser = SettingsParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(RunConfig):
        title = f.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        help_text = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, ()):
            help_text += f" (default of warm: {f.default})"
        options: dict[str, Any] = {"metavar": _metavar(f)}
        if "choices" in f.metadata:
            options = {"choices": f.metadata["choices"]}
        if "nargs" in f.metadata:
            options["nargs"] = f.metadata["nargs"]
        if f.name in several:
            options["nargs"] = "+"
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help_text, **options)
    groups["run"].add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file of settings under the same names; flags override it",
    )
    groups["run"].add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def _metavar(f: "dataclasses.Field[Any]") -> str:
    kinds = typing.get_args(f.type) or (f.type,)
    if f.metadata.get("all"):
        return "N|all"
    return "N" if int in kinds else "X" if float in kinds else "TEXT"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the settings or a loss that is not finite, 130 and 143 interrupted."""
    given = vars(build_parser().parse_args(argv))
    debug, config_file = given.pop("debug", False), given.pop("config", None)
    return exit_code(lambda: _train(make_config(given, config_file)), debug)


def _train(config: RunConfig) -> None:
    quiet_libraries()
    # Imported here: a mistake in the flags is answered before torch is loaded.
    from cascade_fast.cascade import run_cascade

    run_cascade(config)


def quiet_libraries() -> None:
    """No warnings and bars of transformers between our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def exit_code(work: Callable[[], None], debug: bool, again: str = "the same command with --resume auto") -> int:
    """Does ``work``; an error of the user's, the system's or of training, or an interruption, becomes a line and its
    exit code. ``again``: what goes on from there."""
    try:
        work()
    except (ConfigError, OSError) as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"interrupted; {again} goes on", file=sys.stderr)
        return 130
    except Exception as error:
        from cascade_fast.cascade import NonFiniteLoss
        from cascade_fast.selection import NonFiniteScores
        from cascade_fast.stage_trainer import Interrupted

        if isinstance(error, Interrupted):
            print(f"interrupted ({error}), saved; {again} goes on", file=sys.stderr)
            return error.exit_code
        if isinstance(error, NonFiniteLoss | NonFiniteScores):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
