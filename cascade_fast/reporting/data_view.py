"""What a run would be trained on, for people and programs: ``python -m cascade_fast.data``."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from rich.text import Text

from cascade_fast.base.sequences import Sequences
from cascade_fast.base.splits import SplitSequences
from cascade_fast.base.texts import token_texts
from cascade_fast.runtime.console import console, say, say_table
from cascade_fast.runtime.visible import visible

LENGTH_ROWS = 8  # of the histogram
BAR = 40  # cells of its longest bar
READ_STYLE, SPECIAL_STYLE = "dim", "cyan"  # of tokens, where there are colours


def data_record(sequences: SplitSequences) -> dict[str, Any]:
    """The counts, for a program. ``labelled_share``: of the tokens that the sequences predict."""
    usage, splits = sequences.usage, sequences.splits
    return {
        "texts": usage.texts,
        "tokens": usage.tokens,
        "used_share": usage.used_share,
        "labelled_share": _labelled_share(splits),
        "sequences": {split: len(of) for split, of in splits.items()},
        "left_out": dict(usage.left_out),
    }


def say_data(sequences: SplitSequences, tokenizer: Any, seq_len: int, show: int) -> None:
    """Counts, notes and warnings, lengths, and the first ``show`` sequences of the training split."""
    splits = sequences.splits
    say(f"data {sequences.source}")
    for line in (*sequences.usage.lines(), *sequences.notes):
        say(f"  {line}")
    rows = [[split, f"{len(of):,}", f"{of.tokens:,}", f"{of.labels:,}"] for split, of in splits.items()]
    say_table(
        f"splits: {_labelled_share(splits):.1%} of their tokens are learnt and measured",
        ["split", "sequences", "tokens", "learnt"],
        rows,
    )
    say(f"lengths of the {sum(map(len, splits.values())):,} sequences, in tokens")
    for line in length_lines(torch.cat([of.length_B for of in splits.values()]).tolist(), seq_len):
        say(f"  {line}")
    train = splits["train"]
    numbers = torch.argsort(train.rank_B)[:show].tolist()
    if numbers:
        say(
            f"{len(numbers):,} of {len(train):,} training sequences, the first in the data's order. learnt: learnt and "
            "measured; read: context only, as the first token of every sequence is"
        )
    for number in numbers:
        _say_sequence(train, number, tokenizer)


def length_lines(lengths: Sequence[int], seq_len: int) -> list[str]:
    """A histogram of lengths, a line for each range; ``seq_len``, the longest there can be, has its own."""
    least, most = min(lengths), max((n for n in lengths if n < seq_len), default=0)
    width = max(1, -(-(most - least + 1) // LENGTH_ROWS))
    ranges = [(low, min(low + width - 1, most)) for low in range(least, most + 1, width)]
    ranges += [(seq_len, seq_len)] * (seq_len in lengths)
    counts = [sum(low <= n <= high for n in lengths) for low, high in ranges]
    names = [str(low) if low == high else f"{low}-{high}" for low, high in ranges]
    columns = max(map(len, names)), len(f"{max(counts):,}")
    lines = []
    for name, count in zip(names, counts, strict=True):
        bar = "#" * -(-BAR * count // max(counts))  # one at least, where there is any
        line = f"{name:>{columns[0]}}  {count:>{columns[1]},}  {count / len(lengths):>6.1%}  {bar}"
        lines.append(line.rstrip())
    return lines


def _labelled_share(splits: dict[str, Sequences]) -> float:
    return sum(of.labels for of in splits.values()) / sum(of.tokens for of in splits.values())


def _say_sequence(sequences: Sequences, number: int, tokenizer: Any) -> None:
    """Every token, in lines of those that are learnt and those that are only read. The first token, which no other
    predicts, stands with the second."""
    ids, labelled = sequences.ids(number).tolist(), sequences.labelled(number).tolist()
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    styles = [f"{'' if learnt else READ_STYLE} {SPECIAL_STYLE if one in special else ''}".strip()
              for one, learnt in zip(ids, [False, *labelled], strict=True)]  # fmt: skip
    tokens = zip([labelled[0], *labelled], token_texts(tokenizer, ids), styles, strict=True)
    say(f"sequence {int(sequences.rank_B[number]) + 1}: {len(labelled):,} tokens, {sum(labelled):,} of them learnt")
    for learnt, group in groupby(tokens, key=lambda token: token[0]):
        name, text = "learnt" if learnt else "read", Text()
        for _, of_token, style in group:
            # A newline is written out and made, so that those at an end are seen.
            text.append(visible(of_token).replace("\n", "\\n\n"), style)
        for line in text.split("\n"):
            console.print(Text(f"  {name:<6} | ") + line)
            name = ""
