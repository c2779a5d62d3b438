"""Text that a cascade, or its base alone, writes on from a prompt.

Shape legend: B prompts, T tokens of the longest prompt.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cascade_fast.base.texts import token_texts
from cascade_fast.input_checks import InputError


@dataclass(frozen=True)
class Continuation:
    """What follows on one prompt. ``texts`` and ``exits`` have an entry for each new token."""

    prompt: str  # as the tokenizer has it, without special tokens
    texts: list[str]  # what the token adds to the text; nothing for a special one
    exits: list[int]  # where it came from: 0 the base, k stage k

    @property
    def text(self) -> str:
        return "".join(self.texts)


def continue_texts(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    base_alone: bool = False,
    use_cache: bool = True,
    special_tokens: bool = True,
    streamer: Any = None,
) -> list[Continuation]:
    """One continuation for each prompt, made as one batch.

    Args:
        model, tokenizer: of :func:`cascade_fast.model.loading.load_model`.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn from the likeliest that make up
            ``top_p`` of the probability.
        seed: of the draws.
        base_alone: with every stage closed.
        special_tokens: whether the tokenizer adds its own to the prompt.
        streamer: of transformers; for one prompt only.

    Raises:
        InputError: a prompt is empty or not Unicode.
    """
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"prompts: {prompt!r}; must be Unicode text") from None
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, return_token_type_ids=False, add_special_tokens=special_tokens
    ).to(model.device)
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    if mask_BT.numel() == 0 or not mask_BT.any(1).all():
        raise InputError("prompts: empty; must have at least one token")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "use_cache": use_cache, "streamer": streamer}
    settings |= {"do_sample": temperature > 0, "pad_token_id": tokenizer.pad_token_id}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if base_alone:
        settings["thresholds"] = [-math.inf] * len(model.stages)
    torch.manual_seed(seed)
    with recorded_exits(model) as steps:
        new_BN = model.generate(**inputs, **settings, output_exits=True)[:, ids_BT.shape[1] :].cpu()
    exit_NB, ids_BT, mask_BT = torch.stack(steps).cpu(), ids_BT.cpu(), mask_BT.cpu().bool()
    found = []
    for row, prompt_T in enumerate(ids_BT):
        before = prompt_T[mask_BT[row]].tolist()
        new = _until_end(new_BN[row].tolist(), model.generation_config.eos_token_id)
        texts = token_texts(tokenizer, [*before, *new])[len(before) :]
        special = set(tokenizer.all_special_ids)
        found.append(
            Continuation(
                prompt=tokenizer.decode(before, skip_special_tokens=True),
                texts=["" if token in special else text for token, text in zip(new, texts, strict=True)],
                exits=exit_NB[: len(new), row].tolist(),
            )
        )
    return found


def chat_prompts(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Each prompt as a user's turn in the model's chat template. Raises InputError where it has none."""
    if tokenizer.chat_template is None:
        raise InputError("chat: the tokenizer has no chat template; leave --chat out")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


@contextmanager
def recorded_exits(model: Any) -> Iterator[list[Any]]:
    """The exits (B,) of the last position of each forward pass, on the device; with ``output_exits=True``."""
    steps: list[Any] = []
    hook = model.register_forward_hook(lambda _model, _args, output: steps.append(output.exits[:, -1]))
    try:
        yield steps
    finally:
        hook.remove()


def _until_end(ids: list[int], end: int | list[int] | None) -> list[int]:
    """The new tokens up to and with the first that ends the text: what follows is padding."""
    ends = end if isinstance(end, list) else [end]
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
