"""``heat_map.json``: some validation text, token by token - where each left the cascade, and what that did to its loss.

Shapes: B blocks, S predicted tokens a block, N = B * S, P scores of a token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.texts import token_texts
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import CHECKSUM, DamagedFile, atomic_write_text, json_checksum, read_json
from cascade_fast.stages.exits import ExitEvaluation

FILE = "heat_map.json"
FORMAT = 1
MAX_BLOCKS = 8
MAX_TOKENS = 4096  # of all blocks together; a longer first block is cut there
DIGITS = 4
_LARGEST = 1e4  # an infinite loss is shown as this one: JSON has no infinity


def heat_map(
    tokenizer: Any,
    ids_BT: Tensor,
    base_loss_N: Tensor,
    evaluation: ExitEvaluation,
    *,
    criterion: str,
    thresholds: list[float],
) -> dict[str, Any]:
    """The heat map of the first ``MAX_BLOCKS`` blocks, ``MAX_TOKENS`` tokens at most.

    Args:
        ids_BT: token blocks of T = S + 1 ids: S tokens that are predicted, after a first one that is only read.
        base_loss_N: the base's cross-entropy of each predicted token, in nats.
        evaluation: the same tokens, each at its own exit.
        thresholds: of the stages kept, in order.
    """
    seq_len = ids_BT.shape[1] - 1
    shown = min(seq_len, MAX_TOKENS)
    blocks = []
    for number in range(min(len(ids_BT), MAX_BLOCKS, max(1, MAX_TOKENS // seq_len))):
        rows = slice(number * seq_len, number * seq_len + shown)
        exits = evaluation.exit_N[rows].tolist()
        score_NP = _rounded(evaluation.score_NP[rows])
        blocks.append(
            {
                "texts": token_texts(tokenizer, ids_BT[number, : shown + 1].tolist()),
                "exits": exits,
                # A token that left at exit k has k + 1 scores; after the last stage there is none.
                "scores": [scores[: exit_ + 1] for scores, exit_ in zip(score_NP, exits, strict=True)],
                "base_loss": _rounded(base_loss_N[rows]),
                "loss": _rounded(evaluation.loss_N[rows]),
            }
        )
    return {
        "format": FORMAT,
        "split": "val",
        "criterion": criterion,
        "thresholds": thresholds,
        "blocks_in_all": len(ids_BT),
        "blocks": blocks,
    }


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
