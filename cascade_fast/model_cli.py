"""What the commands that run a trained cascade share: naming it, loading it, and answering mistakes."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_fast.config import DTYPES, ConfigError


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
    try:
        return run(asked)
    except (ConfigError, OSError) as error:
        if asked.debug:
            raise
        print(f"error: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr)
        return 2


def load_model(run: str, *, device: str, dtype: str, base_path: str | None) -> tuple[Any, Any]:
    """Model and tokenizer, ready to run."""
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
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"RUN: {run!r}; no such folder, and not to be had from the hub: {reason}") from error
    tokenizer = load_tokenizer(f"RUN: {run!r}", model.base_folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.requires_grad_(False).to(where), tokenizer
