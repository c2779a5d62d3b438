"""The full fine-tune: every weight of the base is trained, embeddings and output head included."""

from pathlib import Path
from typing import Any

import torch

from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import RunSettings
from cascade_fast.training.finetune import finetune


class FullMethod:
    """Trains all that the base has; see :class:`~cascade_fast.training.finetune.Method`."""

    name, title = "full", "full fine-tune"

    def dtype(self, compute: Compute) -> torch.dtype:
        return torch.float32

    def prepare(self, model: Any, settings: RunSettings) -> None:
        model.requires_grad_(True)


def full_finetune(settings: RunSettings) -> Path:
    """See :func:`~cascade_fast.training.finetune.finetune`."""
    return finetune(settings, FullMethod())
