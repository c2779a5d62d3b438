"""``python -m cascade_fast.generate RUN "prompt"``: continues text with a cascade, and shows where each token left."""

import argparse
import sys
from collections import Counter
from itertools import groupby
from typing import Any

from cascade_fast.command_line import add_model_arguments, add_run_argument, run_command
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.visible import visible

COLOURS = ("default", "yellow", "magenta", "cyan", "green", "blue", "red")  # of the base, stage 1, stage 2, ...


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.generate",
        description="Continue text with a cascade. Tokens are drawn at random, the same ones for the same --seed: a "
        "small model that always takes the likeliest (--temperature 0) soon repeats itself.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to go on from; several make a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, metavar="X", help="sample from the likeliest, X in all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--show-exits", action="store_true", help="show which exit each new token came from")
    parser.add_argument(
        "--compare-base", action="store_true", help="show how the base alone goes on, then the cascade with its exits"
    )
    parser.add_argument("--no-cache", action="store_true", help="read everything anew for each token (same result)")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="into a pipe or a file only: control characters as they are; otherwise they are made visible",
    )
    add_model_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: _run(asked), debug=asked.debug)


def _check(asked: argparse.Namespace) -> None:
    for name, good, allowed in (
        ("max_new_tokens", asked.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 <= asked.temperature < float("inf"), "must be at least 0"),
        ("top_p", 0 < asked.top_p <= 1, "must be in (0, 1]"),
        ("raw", not (asked.raw and sys.stdout.isatty()), "this terminal would obey the text: pipe it on"),
        ("raw", not asked.raw or not (asked.show_exits or asked.compare_base), "is for the text alone, not its exits"),
    ):
        if not good:
            raise InputError(f"{name}: {getattr(asked, name)}; {allowed}")


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    from cascade_fast.model.continuation import continue_texts
    from cascade_fast.model.loading import load_model

    model, tokenizer = load_model(asked.run, device=asked.device, dtype=asked.dtype, base_path=asked.base_path)
    prompts = asked.prompts
    if asked.chat:
        if tokenizer.chat_template is None:
            raise InputError("chat: the tokenizer has no chat template; leave --chat out")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    streams = len(prompts) == 1 and not asked.show_exits and not asked.compare_base
    how: dict[str, Any] = {
        "max_new_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "use_cache": not asked.no_cache,
        "special_tokens": not asked.chat,  # the template has them
        "streamer": _streamer(tokenizer, asked.raw) if streams else None,
    }
    of_base = continue_texts(model, tokenizer, prompts, base_alone=True, **how) if asked.compare_base else []
    of_cascade = continue_texts(model, tokenizer, prompts, **how)
    if streams:
        return 0
    for number, found in enumerate(of_cascade):
        if asked.compare_base:
            print("--- base alone")
            print(visible(of_base[number].prompt + of_base[number].text))
            print("--- cascade")
        if asked.show_exits or asked.compare_base:
            _show_exits(found, len(model.stages))
        else:
            text = found.prompt + found.text
            print(text if asked.raw else visible(text))
    return 0


def _streamer(tokenizer: Any, raw: bool) -> Any:
    """Prints prompt and new text as it comes."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text if raw else visible(text), stream_end)

    return Streamer(tokenizer, skip_special_tokens=True)


def _show_exits(found: Any, stages: int) -> None:
    """The text of a :class:`Continuation` with its tokens in the colours of their exits - or, where there are no
    colours, those of stage k within ``[k: ...]`` - and a legend with each exit's count and share."""
    from rich.text import Text

    from cascade_fast.runtime.console import console

    coloured = console.is_terminal and console.color_system is not None and not console.no_color
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
    console.print(text)
    console.print(legend)


def _style(exit_: int) -> str:
    return COLOURS[exit_ % len(COLOURS)]


if __name__ == "__main__":
    sys.exit(main())
