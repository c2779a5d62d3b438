"""``python -m cascade_fast.generate RUN "prompt"``: continues text with a cascade, and shows where each token left."""

import argparse
import sys
from typing import Any

from cascade_fast.command_line import add_model_arguments, add_run_argument, run_command
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.visible import visible


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
    from cascade_fast.model.continuation import chat_prompts, continue_texts
    from cascade_fast.model.loading import load_model
    from cascade_fast.reporting.shown_text import print_exits, text_streamer

    model, tokenizer = load_model(asked.run, device=asked.device, dtype=asked.dtype, base_path=asked.base_path)
    prompts = chat_prompts(tokenizer, asked.prompts) if asked.chat else asked.prompts
    streams = len(prompts) == 1 and not asked.show_exits and not asked.compare_base
    how: dict[str, Any] = {
        "max_new_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": asked.seed,
        "use_cache": not asked.no_cache,
        "special_tokens": not asked.chat,  # the template has them
        "streamer": text_streamer(tokenizer, asked.raw) if streams else None,
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
            print_exits(found, len(model.stages))
        else:
            text = found.prompt + found.text
            print(text if asked.raw else visible(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
