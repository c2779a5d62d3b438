"""``heat_map.json``: some validation text, token by token - where each left the cascade, and what that did to its loss.

What has no label has None for exit, scores and losses.

Shapes: N tokens, P scores of a token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.sequences import Sequences
from cascade_fast.base.texts import token_texts
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import CHECKSUM, DamagedFile, atomic_write_text, json_checksum, read_json
from cascade_fast.stages.exits import ExitEvaluation

FILE = "heat_map.json"
FORMAT = 1
MAX_BLOCKS = 8
MAX_TOKENS = 4096  # of all sequences together; a longer first one is cut there
DIGITS = 4
_LARGEST = 1e4  # an infinite loss is shown as this one: JSON has no infinity


def heat_map(
    tokenizer: Any,
    sequences: Sequences,
    evaluation: ExitEvaluation,
    *,
    criterion: str,
    thresholds: list[float],
) -> dict[str, Any]:
    """The heat map of the first ``MAX_BLOCKS`` sequences, ``MAX_TOKENS`` tokens at most.

    Args:
        sequences: of validation.
        evaluation: their labelled tokens, each at its own exit.
        thresholds: of the stages kept, in order.
    """
    blocks, shown = list[dict[str, Any]](), 0
    for number in range(min(len(sequences), MAX_BLOCKS)):
        ids = sequences.ids(number)[: MAX_TOKENS + 1].tolist()
        tokens = len(ids) - 1
        if blocks and shown + tokens > MAX_TOKENS:
            break
        shown += tokens
        first, end = torch.searchsorted(evaluation.sequence_N, torch.tensor([number, number + 1])).tolist()
        here = slice(first, first + int((evaluation.position_N[first:end] < tokens).sum()))
        place_J = evaluation.position_N[here].long()
        # A token that left at exit k has k + 1 scores; after the last stage there is none.
        exits: list[int] = evaluation.exit_N[here].tolist()
        scores = [of[: exit_ + 1] for of, exit_ in zip(_rounded(evaluation.score_NP[here]), exits, strict=True)]
        losses = {"base_loss": _rounded(evaluation.base_loss_N[here]), "loss": _rounded(evaluation.loss_N[here])}
        columns: dict[str, list[Any]] = {"exits": exits, "scores": scores, **losses}
        if len(exits) < tokens:  # without a label: no exit, score or loss
            columns = {name: _spread(values, place_J.tolist(), tokens) for name, values in columns.items()}
        blocks.append({"texts": token_texts(tokenizer, ids), **columns})
    return {
        "format": FORMAT,
        "split": "val",
        "criterion": criterion,
        "thresholds": thresholds,
        "blocks_in_all": len(sequences),
        "blocks": blocks,
    }


def _spread(values: list[Any], places: list[int], tokens: int) -> list[Any]:
    """``values`` at their places of ``tokens``, None elsewhere."""
    spread: list[Any] = [None] * tokens
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def write_heat_map(folder: Path, content: dict[str, Any]) -> None:
    whole = {**content, CHECKSUM: json_checksum(content)}  # as write_json, on one line: it is long
    atomic_write_text(folder / FILE, json.dumps(whole, separators=(",", ":"), allow_nan=False) + "\n")


def read_heat_map(folder: Path) -> dict[str, Any] | None:
    """The heat map of a run; None if it has none. Raises InputError as :func:`read_record`."""
    return read_record(folder / FILE, FORMAT, needs=("thresholds", "blocks_in_all", "blocks"))


def read_record(path: Path, record_format: int, *, needs: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object in ``path`` with the keys ``needs`` and ``record_format`` as its ``format``; None where there is
    no file.

    Raises:
        InputError: a file that is damaged, or of another format.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != record_format:
        raise InputError(f"{str(path)!r} has format {content.get('format')!r}; this version reads {record_format}")
    for name in needs:
        if name not in content:
            raise DamagedFile(f"{str(path)!r} is damaged: has no {name}")
    return content


def _rounded(values: Tensor) -> list[Any]:
    """As nested lists of finite numbers; what stands where a token did not come is cut off."""
    return torch.round(values.double().nan_to_num(_LARGEST).clamp(-_LARGEST, _LARGEST), decimals=DIGITS).tolist()
