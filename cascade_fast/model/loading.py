"""A trained cascade and its tokenizer, ready to run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade_fast.base.model import load_tokenizer
from cascade_fast.input_checks import InputError, one_line
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import choose_device
from cascade_fast.runtime.console import quiet_libraries
from cascade_fast.runtime.run_folder import check_run


@contextmanager
def looking_for(run: str) -> Iterator[None]:
    """Raises InputError where ``run`` is not a finished run or a cascade, here or, as the work within finds out, on the
    hub."""
    if Path(run).exists():
        check_run(Path(run))
    try:
        yield
    except OSError as error:
        if Path(run).is_dir():
            raise
        raise InputError(f"RUN: {run!r}; no such folder, and not to be had from the hub: {one_line(error)}") from error


def load_model(run: str, *, device: str, dtype: str, base_path: str | None) -> tuple[Any, Any]:
    """Model and tokenizer (padding on the left), ready to run.

    Raises:
        InputError: ``run`` is not a finished run or a cascade, its base is not found, or ``device`` is not there.
    """
    quiet_libraries()
    with looking_for(run):
        where = choose_device(device)
        model: Any = CascadeForCausalLM.from_pretrained(run, dtype=dtype, base_path=base_path)
    tokenizer = padding_left(load_tokenizer(f"RUN: {run!r}", model.base_folder))
    return model.requires_grad_(False).to(where), tokenizer


def padding_left(tokenizer: Any) -> Any:
    """The tokenizer, set up for prompts of several lengths."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer
