"""The text that a cascade is evaluated on: its own run's, or another one."""

from typing import Any

from cascade_fast.base.general_text import load_general
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import OF_ONE_DATASET, all_sequences, load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.resume import RESUME_MAY_CHANGE, saved_settings
from cascade_fast.settings import GENERAL, RunSettings, make_settings


def evaluation_text(
    config: CascadeConfig,
    tokenizer: Any,
    *,
    split: str = "val",
    dataset: str | None = None,
    seq_len: int | None = None,
    limit: int | None = None,
    **text: Any,
) -> tuple[Sequences, str]:
    """Sequences of tokens, at least one, and what they are.

    Args:
        split: ``train``, ``val`` or ``test`` of the text that the cascade was trained on; ``general``: the other text
            that its run has read at the end.
        dataset: another text instead, all of it; as the setting of training.
        seq_len: tokens of a sequence at most; None: that of training.
        limit: the first so many sequences only.
        text: other settings of training that say how ``dataset`` is read. Those that are not given are as in training,
            but for ``OF_ONE_DATASET``, which are as for a run that does not give them.

    Raises:
        InputError: no such text, or none that is known; ``seq_len`` above the base's positions; no sequence.
    """
    asked = _asked(config, seq_len, dataset, text)
    found: Sequences | None
    if dataset is not None:
        found, source = all_sequences(asked, tokenizer, limit), asked.dataset
    elif split == GENERAL:
        found, source = load_general(asked, tokenizer), f"{asked.general_text}, other text"
    else:
        found, source = load_sequences(asked, tokenizer).splits[split], f"{asked.dataset}, {split}"
    if not found:
        raise InputError(f"split: {split!r}; the run has no such text")
    return found.first(limit), source


def splits_of_run(config: CascadeConfig, tokenizer: Any) -> dict[str, Sequences]:
    """``train``, ``val`` and ``test`` of the text that the cascade was trained on, read once. Raises InputError: it is
    not known, or a split has no sequence."""
    splits = load_sequences(_asked(config), tokenizer).splits
    for name, found in splits.items():
        if not found:
            raise InputError(f"split: {name!r}; the run has no such text")
    return splits


def _asked(
    config: CascadeConfig, seq_len: int | None = None, dataset: str | None = None, text: dict[str, Any] | None = None
) -> RunSettings:
    settings = {n: value for n, value in saved_settings(config.settings).items() if n not in RESUME_MAY_CHANGE}
    if dataset is None and not config.settings:
        raise InputError("dataset: not given, and this cascade does not know what it was trained on")
    if seq_len is not None:
        settings["seq_len"] = seq_len
    if dataset is not None:
        settings = {name: value for name, value in settings.items() if name not in OF_ONE_DATASET}
        settings |= {"dataset": dataset, **(text or {})}
    asked, longest = make_settings(settings), config.max_position_embeddings
    if asked.seq_len > longest:
        raise InputError(f"seq_len: {asked.seq_len}; the base has {longest} positions")
    return asked
