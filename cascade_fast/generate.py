"""``python -m cascade_fast.generate RUN "prompt"``: continues text with a cascade, and shows where each token left."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cascade_fast.config import ConfigError
from cascade_fast.model_cli import add_model_arguments, add_run_argument, answer, load_model

COLOURS = ("default", "yellow", "magenta", "cyan", "green", "blue", "red")  # of the base, stage 1, stage 2, ...


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cascade_fast.generate",
        description="Continue text with a cascade. Greedy unless --temperature is above 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_run_argument(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to go on from; several make a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add at most")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample from the likeliest, X in all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--show-exits", action="store_true", help="colour each new token by the exit it came from")
    parser.add_argument("--no-cache", action="store_true", help="read everything anew for each token (same result)")
    add_model_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in what was asked for."""
    return answer(_run, build_parser().parse_args(argv))


def _check(asked: argparse.Namespace) -> None:
    for name, good, allowed in (
        ("max_new_tokens", asked.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 <= asked.temperature < float("inf"), "must be at least 0"),
        ("top_p", 0 < asked.top_p <= 1, "must be in (0, 1]"),
    ):
        if not good:
            raise ConfigError(f"{name}: {getattr(asked, name)}; {allowed}")


@contextmanager
def recorded_exits(model: Any) -> Iterator[list[Any]]:
    """The exits (B,) of the last position of each forward pass, as they come; with ``output_exits=True``."""
    steps: list[Any] = []
    hook = model.register_forward_hook(lambda _model, _args, output: steps.append(output.exits[:, -1].cpu()))
    try:
        yield steps
    finally:
        hook.remove()


def _run(asked: argparse.Namespace) -> int:
    _check(asked)
    import torch
    from transformers import TextStreamer

    model, tokenizer = load_model(asked.run, device=asked.device, dtype=asked.dtype, base_path=asked.base_path)
    prompts = asked.prompts
    if asked.chat:
        if tokenizer.chat_template is None:
            raise ConfigError("chat: the tokenizer has no chat template; leave --chat out")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("prompts: empty; must have at least one token")
    settings: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "use_cache": not asked.no_cache}
    settings |= {"do_sample": asked.temperature > 0, "pad_token_id": tokenizer.pad_token_id}
    if asked.temperature > 0:
        settings |= {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    torch.manual_seed(asked.seed)
    streams = len(prompts) == 1 and not asked.show_exits
    if streams:
        settings["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    with recorded_exits(model) as steps:
        ids_BS = model.generate(**inputs, **settings, output_exits=True)
    if not streams:
        new_BS = ids_BS[:, inputs["input_ids"].shape[1] :].cpu()
        for row, prompt in enumerate(prompts):
            ids = _until_end(new_BS[row].tolist(), model.generation_config.eos_token_id)
            exits = [int(step[row]) for step in steps[: len(ids)]]
            _show(tokenizer, prompt, ids, exits if asked.show_exits else None, len(model.stages))
    return 0


def _until_end(ids: list[int], end: int | list[int] | None) -> list[int]:
    """The new tokens up to and with the first that ends the text: what follows is padding."""
    ends = end if isinstance(end, list) else [end]
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _show(tokenizer: Any, prompt: str, ids: list[int], exits: list[int] | None, stages: int) -> None:
    from rich.text import Text

    from cascade_fast.metrics import console, say

    if exits is None:
        say(prompt + tokenizer.decode(ids, skip_special_tokens=True))
        return
    names = ["base", *(f"stage {n}" for n in range(1, stages + 1))]
    text, before = Text(prompt, style="dim"), ""
    for i, exit_ in enumerate(exits, 1):
        now = tokenizer.decode(ids[:i], skip_special_tokens=True)  # a token alone may be half a character
        text.append(now[len(before) :], style=_style(exit_))
        before = now
    console.print(text)
    legend = Text("exits: ")
    for number, name in enumerate(names):
        legend.append(f"{name} {exits.count(number)}", style=_style(number))
        legend.append("  ")
    console.print(legend)
    if not console.is_terminal:  # no colours there
        say("exit of each token: " + " ".join(map(str, exits)))


def _style(exit_: int) -> str:
    return COLOURS[exit_ % len(COLOURS)]


if __name__ == "__main__":
    sys.exit(main())
