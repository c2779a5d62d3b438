"""LoRA with the library peft: the whole base is frozen, its linear layers get trained updates of low rank.

The update of a weight is ``B @ A * alpha / rank``, with ``A`` random and ``B`` zero at first (Hu et al. 2021, arXiv
2106.09685). As peft does it by default, the base is in the compute dtype and the updates are float32.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from cascade_fast.input_checks import InputError, one_line
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import LORA_TARGETS, RunSettings
from cascade_fast.training.finetune import finetune


class LoraMethod:
    """Trains adapters of ``lora_rank``, ``lora_alpha`` and ``lora_targets``; see
    :class:`~cascade_fast.training.finetune.Method`."""

    name, title = "lora", "LoRA fine-tune"

    def dtype(self, compute: Compute) -> torch.dtype:
        return compute.dtype

    def prepare(self, model: Any, settings: RunSettings) -> None:
        import peft

        alpha: Any = settings.lora_alpha  # peft says int, and divides it by the rank
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=list(settings.lora_targets or LORA_TARGETS),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):  # matrices are made on the CPU, wherever they go then
            torch.default_generator.manual_seed(settings.seed)
            with warnings.catch_warnings():  # of what peft asks transformers for
                warnings.simplefilter("ignore", FutureWarning)
                peft.get_peft_model(model, config)  # changes the model itself


def check_peft() -> None:
    """Raises InputError where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"the method lora needs peft: pip install peft, or --skip lora ({one_line(error)})") from None


def lora_finetune(settings: RunSettings) -> Path:
    """See :func:`~cascade_fast.training.finetune.finetune`. Raises InputError, too, where peft cannot be imported."""
    check_peft()
    return finetune(settings, LoraMethod())
