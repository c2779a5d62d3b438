"""What the commands share: flags made of the settings, and the exit code of whatever happens."""

import argparse
import dataclasses
import io
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cascade_fast.input_checks import InputError, one_line, suggest
from cascade_fast.runtime.processes import (
    Processes,
    end_processes,
    first_to_fail,
    lost_another,
    start_processes,
    started_count,
)
from cascade_fast.settings import DTYPES, RunSettings, explain


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
        means = f" ({explain(name)})" if name in RunSettings.__dataclass_fields__ else ""
        return f"; {flag}: did you mean --{name.replace('_', '-')}{means}?"


def settings_parser(prog: str, description: str, several: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A command line with one flag for each setting, in the settings' groups. ``several``: those that take a list."""
    parser = SettingsParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(RunSettings):
        title = f.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        help_text = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, ()):
            help_text += f" (default of warm: {f.default})"
        options: dict[str, Any] = {"metavar": _metavar(f)}
        if "choices" in f.metadata:
            options = {"choices": f.metadata["choices"]}
        if f.metadata.get("switch"):  # the flag alone turns it on
            options |= {"nargs": "?", "const": "on"}
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


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, a saved cascade, or its hub id")


def add_model_arguments(parser: argparse.ArgumentParser | Any) -> None:
    """To a parser or a group of one."""
    parser.add_argument("--base-path", metavar="TEXT", help="where the base is now, if not where it was in training")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="compute dtype; auto: that of training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


@contextmanager
def together() -> Iterator[Processes]:
    """Within, the processes that torchrun has started know of each other, and the first one speaks."""
    # Imported here: a mistake in the flags is answered before torch is loaded.
    from cascade_fast.runtime.console import console, quiet_libraries

    quiet_libraries()
    these = start_processes()
    if not these.first:
        console.quiet = True
        warnings.simplefilter("ignore")
    yield these
    end_processes()


def run_command(work: Callable[[], int | None], *, debug: bool, again: str | None = None, several: bool = False) -> int:
    """The exit code of a command whose work is ``work``, which returns its own (None: 0).

    2, after a line that says why: a mistake in what was asked for, the system's no, or training that diverged; 130 and
    143: interrupted by Ctrl-C or SIGTERM. ``again``: what goes on from there, if something does.
    ``several``: whether several processes may do the work :func:`together`. Of these the one that fails first says why.
    """

    def complain(text: str) -> None:
        if first_to_fail():
            print(text, file=sys.stderr)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may say what the terminal's encoding lacks
    try:
        if not several and started_count() > 1:
            raise InputError(
                f"WORLD_SIZE: {started_count()}; this command runs in one process: start it without torchrun"
            )
        return work() or 0
    except (InputError, OSError) as error:
        if debug:
            raise
        complain(f"error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        complain("interrupted" + (f"; {again} goes on" if again else ""))
        return 130
    except Exception as error:
        # Imported here: a mistake in the flags is answered before torch is loaded.
        from cascade_fast.selection import NonFiniteScores
        from cascade_fast.training.trainer import Interrupted, NonFiniteLoss

        if isinstance(error, Interrupted):
            complain(f"interrupted ({error}), saved; {again} goes on")
            return error.exit_code
        if isinstance(error, NonFiniteLoss | NonFiniteScores):
            complain(f"error: {one_line(error)}")
            return 2
        if lost_another(error) and not debug:
            complain("error: another process of this run is gone" + (f"; {again} goes on" if again else ""))
            return 1
        if not debug and not first_to_fail():
            return 1
        raise
