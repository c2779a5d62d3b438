"""``--sample-prompt``: how the base, and after each stage the cascade so far, writes on from the user's prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cascade_fast.base.chat_template import chat_template_of
from cascade_fast.base.model import BaseModel
from cascade_fast.criteria import model_criteria
from cascade_fast.input_checks import InputError, one_line, shown
from cascade_fast.model.configuration import cascade_config
from cascade_fast.runtime.compute import Compute, release_memory
from cascade_fast.runtime.console import say, working
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.runtime.processes import processes
from cascade_fast.settings import RunSettings
from cascade_fast.stages.exits import ExitStage

NEW_TOKENS = 32


def check_prompts(settings: RunSettings, base: BaseModel, tokenizer: Any) -> None:
    """Raises InputError where nothing can be written on from ``settings.sample_prompt``."""
    if not settings.sample_prompt:
        return
    if settings.criterion not in model_criteria():
        raise InputError(
            f"sample_prompt, criterion: a cascade by {settings.criterion!r} cannot be run as a model; leave "
            "sample_prompt out, or choose another criterion"
        )
    most = base.config.max_position_embeddings - NEW_TOKENS
    for prompt in settings.sample_prompt:
        try:
            tokens = len(tokenizer(prompt, verbose=False)["input_ids"])
        except UnicodeEncodeError:
            raise InputError(f"sample_prompt: {shown(prompt)}; must be Unicode text") from None
        if not prompt or not 1 <= tokens <= most:
            raise InputError(f"sample_prompt: {shown(prompt)}; {tokens} tokens, must be from 1 to {most}")


@dataclass
class PromptSamples:
    """The continuations of a run's prompts. No random number of the run's is drawn for them, and what goes wrong with
    them is a line and no more."""

    settings: RunSettings
    base: BaseModel
    compute: Compute
    log: MetricsLog
    folder: Path  # of the run
    chats: bool = False  # whether a prompt is a user's turn in the chat template
    of_base: list[str] = field(default_factory=list)  # once they are known

    def before(self) -> None:
        """Before a stage is trained: says the base's, unless they have been said."""
        if self.settings.sample_prompt and not self.of_base and processes().first:
            self.of_base = self._continue([])
            self._say("the base", self.of_base)

    def after(self, stages: Sequence[ExitStage]) -> None:
        """After a stage that is kept: says those of ``stages``, which lie in the run's folder, and logs them."""
        if not (self.settings.sample_prompt and processes().first):
            return
        texts = self._continue(stages)
        self._say(f"the cascade with stage {len(stages)}", texts)
        for number, text in enumerate(texts):
            self.log.write(
                "sample",
                stage=len(stages),
                number=number + 1,
                prompt=self.settings.sample_prompt[number],
                base=self.of_base[number] if self.of_base else None,
                cascade=text,
            )

    def _say(self, who: str, texts: list[str]) -> None:
        if texts:
            say(f"{who} writes on:")
        for prompt, text in zip(self.settings.sample_prompt, texts, strict=False):
            say(f"  {json.dumps(prompt, ensure_ascii=False)} -> {json.dumps(text, ensure_ascii=False)}")

    def _continue(self, stages: Sequence[ExitStage]) -> list[str]:
        """A text for each prompt; none where something went wrong."""
        try:
            with working("loading the base and writing on from the sample prompts"):
                return continue_prompts(
                    self.settings.sample_prompt,
                    self.base,
                    stages,
                    criterion=self.settings.criterion,
                    compute=self.compute,
                    folder=self.folder,
                    template=chat_template_of(self.settings, self.base.tokenizer()) if self.chats else None,
                )
        except Exception as error:  # memory, above all: the run is worth more
            say(f"note: sample_prompt: nothing was written: {one_line(error)}")
            return []
        finally:
            release_memory()


def continue_prompts(
    prompts: Sequence[str],
    base: BaseModel,
    stages: Sequence[ExitStage],
    *,
    criterion: str,
    compute: Compute,
    folder: Path,
    template: str | None = None,
) -> list[str]:
    """What the cascade of ``base`` and ``stages`` (none: the base alone) writes on, greedily. The stages' weights are
    read from ``folder``. The global random numbers stay where they are.

    ``template``: the chat template of which each prompt is a user's turn.
    """
    # Here, because they take seconds to import, and a run without prompts needs none of them.
    from cascade_fast.model.continuation import chat_prompts, continue_texts
    from cascade_fast.model.loading import padding_left
    from cascade_fast.model.modeling import CascadeForCausalLM
    from cascade_fast.model.weights import checked_load, load_thin

    def load(*args: Any, **options: Any) -> tuple[Any, Any]:
        return checked_load(CascadeForCausalLM.from_pretrained, "sample_prompt", *args, **options)

    with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
        config = cascade_config(base, stages, criterion=criterion)
        model, _ = load_thin(load, folder, config, base, dtype=compute.dtype)
        model.requires_grad_(False).to(compute.device)
        tokenizer = padding_left(base.tokenizer())
        asked = list(prompts)
        if template is not None:
            tokenizer.chat_template = template
            asked = chat_prompts(tokenizer, asked)
        found = continue_texts(model, tokenizer, asked, max_new_tokens=NEW_TOKENS, special_tokens=template is None)
    return [continuation.text for continuation in found]
