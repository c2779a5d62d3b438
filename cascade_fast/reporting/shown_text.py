"""Generated text on the console: as it comes, or with the exit that each of its tokens came from."""

from collections import Counter
from itertools import groupby
from typing import Any

from rich.text import Text
from transformers import TextStreamer

from cascade_fast.model.continuation import Continuation
from cascade_fast.runtime import console
from cascade_fast.runtime.visible import visible

COLOURS = ("default", "yellow", "magenta", "cyan", "green", "blue", "red")  # of the base, stage 1, stage 2, ...


def text_streamer(tokenizer: Any, raw: bool) -> TextStreamer:
    """Prints prompt and new text as it comes; ``raw``: control characters as they are, not made visible."""

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text if raw else visible(text), stream_end)

    return Streamer(tokenizer, skip_special_tokens=True)


def print_exits(found: Continuation, stages: int) -> None:
    """The text with its tokens in the colours of their exits - or, where there are no colours, those of stage k within
    ``[k: ...]`` - and a legend with each exit's count and share."""
    terminal = console.console
    coloured = terminal.is_terminal and terminal.color_system is not None and not terminal.no_color
    text = Text().append(visible(found.prompt), style="dim")
    for exit_, group in groupby(zip(found.exits, found.texts, strict=True), key=lambda pair: pair[0]):
        part = visible("".join(of_token for _, of_token in group))
        text.append(part if coloured or exit_ == 0 else f"[{exit_}:{part}]", style=_style(exit_))
    counts = Counter(found.exits)
    legend = Text("exits:")
    for number in range(stages + 1):
        name = f"stage {number}" if number else "base"
        mark = f"[{number}: ...] " if number and not coloured else ""
        legend.append("  " if number else " ")
        legend.append(f"{mark}{name}: {counts[number]} ({counts[number] / len(found.exits):.0%})", style=_style(number))
    terminal.print(text)
    terminal.print(legend)


def _style(exit_: int) -> str:
    return COLOURS[exit_ % len(COLOURS)]
