"""Other text: what a run does not train on, read once at its end, to tell what training did to the model on it."""

import dataclasses
import os
from typing import Any

from cascade_fast.base.sequences import Sequences
from cascade_fast.base.splits import one_split
from cascade_fast.base.texts import OF_ONE_DATASET, load_token_texts
from cascade_fast.input_checks import InputError, shown
from cascade_fast.settings import GENERAL, SPLITS, UNITS, RunSettings


def load_general(settings: RunSettings, tokenizer: Any) -> Sequences | None:
    """The first sequences of ``settings.general_text``, shuffled, as many as validation has by default: the same for
    every run with that text, ``seq_len`` and tokenizer. None where there is no such text.

    Its columns are found by their names: ``text_columns``, templates and ``encoding`` are those of ``dataset`` alone.

    Raises:
        InputError: the text that is trained on, or as :func:`load_token_texts`.
    """
    named = settings.general_text
    if named is None:
        return None
    if _same_text(named, settings.dataset):
        raise InputError(
            f"general_dataset: {shown(named)}; is the text that is trained on: must be another one, or none"
        )
    defaults = {f.name: f.default for f in dataclasses.fields(RunSettings)}
    asked: dict[str, Any] = {name: defaults[name] for name in OF_ONE_DATASET}
    asked |= {f"{split}_{unit}": None for split in SPLITS for unit in UNITS}
    asked |= {"dataset": named, "shuffle": "on", "streaming": "off" if named == "pydoc" else settings.streaming}
    reading = dataclasses.replace(settings, **asked)
    try:
        texts = load_token_texts(reading, tokenizer).texts
        return one_split(texts, reading, tokens=settings.expected_tokens(GENERAL))
    except ImportError as error:  # a Python that comes without pydoc_data
        if settings.general_dataset is None:
            return None
        raise InputError(f"general_dataset: {shown(named)}; this Python does not have it: {error}") from error
    except InputError as error:
        raise InputError(f"general_dataset: {str(error).removeprefix('dataset: ')}") from error


def _same_text(one: str, other: str) -> bool:
    """Of datasets' names; two paths may lead to one file or folder."""
    try:
        return one == other or os.path.samefile(one, other)
    except (OSError, ValueError):  # no such path
        return False
