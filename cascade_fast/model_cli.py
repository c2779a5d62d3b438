"""What the commands that run a trained cascade share: naming it, loading it, and answering mistakes."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_fast.config import DTYPES, ConfigError
from cascade_fast.input_checks import one_line

LOCK = "run.lock"


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, a saved cascade, or its hub id")


def add_model_arguments(parser: argparse.ArgumentParser | Any) -> None:
    """To a parser or a group of one."""
    parser.add_argument("--base-path", metavar="TEXT", help="where the base is now, if not where it was in training")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="compute dtype; auto: that of training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def answer(run: Callable[[argparse.Namespace], int], asked: argparse.Namespace) -> int:
    """The exit code of ``run``: 2, after one line that says why, for a mistake in what was asked for."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may say what the terminal's encoding lacks
    try:
        return run(asked)
    except (ConfigError, OSError) as error:
        if asked.debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def check_run(folder: Path, *, results: bool = False) -> None:
    """Makes sure that ``folder`` holds a finished run or, unless ``results`` are needed too, a saved cascade.

    Raises:
        ConfigError: it holds something else, a run that is still training, or one that was interrupted.
    """
    from cascade_fast.files import is_temporary, read_json

    if not folder.is_dir():
        raise ConfigError(f"RUN: {str(folder)!r}; {'is a file' if folder.exists() else 'no such folder'}")
    if (folder / "config.json").exists():
        config = read_json(folder / "config.json")
    elif (folder / LOCK).exists() and all(path.name == LOCK or is_temporary(path) for path in folder.iterdir()):
        config = {"machine": None}  # a run that has only just begun
    else:
        raise ConfigError(f"RUN: {str(folder)!r}; is not the folder of a run: it has no config.json")
    if not {"machine", "model_type"} & config.keys():
        raise ConfigError(f"RUN: {str(folder)!r}; its config.json is not that of a run or of a cascade")
    if "machine" not in config and results:
        raise ConfigError(f"RUN: {str(folder)!r}; holds a saved model: results are in the folder of its run")
    if "model_type" in config and (not results or (folder / "results.json").exists()):
        return
    if _in_use(folder / LOCK):
        raise ConfigError(f"RUN: {str(folder)!r}; is still training: no results yet")
    raise ConfigError(
        f"RUN: {str(folder)!r}; the run was interrupted: no results yet. The command that began it goes on with "
        f"--out {shlex.quote(str(folder))} --resume auto"
    )


def _in_use(lock: Path) -> bool:
    """Whether another process holds the lock; no where that cannot be found out, as in a read-only folder."""
    if not lock.exists():
        return False
    from cascade_fast.files import LockHeld, acquire_lock

    try:
        acquire_lock(lock, timeout=0).release()
    except LockHeld:
        return True
    except OSError:
        pass
    return False


def load_model(run: str, *, device: str, dtype: str, base_path: str | None) -> tuple[Any, Any]:
    """Model and tokenizer (padding on the left), ready to run.

    Raises:
        ConfigError: ``run`` is not a finished run or a cascade, its base is not found, or ``device`` is not there.
    """
    if Path(run).exists():
        check_run(Path(run))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from cascade_fast.base_model import load_tokenizer
    from cascade_fast.hardware import choose_device
    from cascade_fast.modeling import CascadeForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = choose_device(device)
    try:
        model: Any = CascadeForCausalLM.from_pretrained(run, dtype=dtype, base_path=base_path)
    except OSError as error:
        if Path(run).is_dir():
            raise
        raise ConfigError(f"RUN: {run!r}; no such folder, and not to be had from the hub: {one_line(error)}") from error
    tokenizer = load_tokenizer(f"RUN: {run!r}", model.base_folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.requires_grad_(False).to(where), tokenizer
