"""``heat_map.json``: some validation text, token by token - where each left the cascade, and what that did to its loss.

Shapes: B blocks, S predicted tokens a block, N = B * S, P doors.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.config import ConfigError
from cascade_fast.exits import ExitEvaluation
from cascade_fast.files import atomic_write_text

FILE = "heat_map.json"
FORMAT = 1
MAX_BLOCKS = 8
MAX_TOKENS = 4096  # of all blocks together; a longer first block is cut there
DIGITS = 4
_MOST_TOKENS_OF_A_CHARACTER = 4  # one for each byte of UTF-8
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
                # A token that left at exit k came to k + 1 doors; behind the last stage there is none.
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


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of tokens that make up a character together, the last has it, the others
    nothing."""

    def decode(first: int, last: int) -> str:
        # Those before it decide whether a token begins with a space.
        return tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    context, done = 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(context, end)
        waits = text.endswith("\ufffd") and end < len(ids) and end - done < _MOST_TOKENS_OF_A_CHARACTER
        texts.append("" if waits else text[len(decode(context, done)) :])
        if not waits:
            context, done = done, end
    return texts


def write_heat_map(folder: Path, content: dict[str, Any]) -> None:
    atomic_write_text(folder / FILE, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def read_heat_map(folder: Path) -> dict[str, Any] | None:
    """The heat map of a run; None if it has none.

    Raises:
        ConfigError: a file that is damaged, or of another format.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"run: {str(path)!r} cannot be read: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ConfigError(f"run: {str(path)!r} has format {found!r}; this version reads {FORMAT}")
    return content


def _rounded(values: Tensor) -> list[Any]:
    """As nested lists of finite numbers; where no door was come to, what stands there is cut off."""
    return torch.round(values.double().nan_to_num(_LARGEST).clamp(-_LARGEST, _LARGEST), decimals=DIGITS).tolist()
