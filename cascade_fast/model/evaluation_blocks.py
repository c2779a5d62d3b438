"""The blocks of text that a cascade is evaluated on: its own run's, or another text."""

from collections.abc import Sequence
from typing import Any

from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import all_sequences, load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.settings import RESUME_MAY_CHANGE, make_settings, saved_settings


def evaluation_blocks(
    config: CascadeConfig,
    tokenizer: Any,
    *,
    split: str = "val",
    dataset: str | None = None,
    text_columns: Sequence[str] | None = None,
    text_template: str | None = None,
    seq_len: int | None = None,
    limit: int | None = None,
) -> tuple[Sequences, str]:
    """Sequences of tokens, and what they are.

    Args:
        split: ``train``, ``val`` or ``test`` of the text that the cascade was trained on.
        dataset, text_columns, text_template: another text instead, all of it; as the settings of training.
        seq_len: S; None: that of training.
        limit: the first so many blocks only.

    Raises:
        InputError: no such text, or none that is known; ``seq_len`` above the base's positions; no block.
    """
    settings = {n: value for n, value in saved_settings(config.settings).items() if n not in RESUME_MAY_CHANGE}
    if dataset is None and not config.settings:
        raise InputError("dataset: not given, and this cascade does not know what it was trained on")
    if seq_len is not None:
        settings["seq_len"] = seq_len
    if dataset is not None:
        settings |= {"dataset": dataset, "text_columns": text_columns, "text_template": text_template}
    text, longest = make_settings(settings), config.max_position_embeddings
    if text.seq_len > longest:
        raise InputError(f"seq_len: {text.seq_len}; the base has {longest} positions")
    if dataset is None:
        found, source = load_sequences(text, tokenizer).splits[split], f"{text.dataset}, {split}"
    else:
        found, source = all_sequences(text, tokenizer, limit), text.dataset
    if len(found) == 0:
        raise InputError(f"split: {split!r}; the run has no such text")
    return found.first(limit), source
