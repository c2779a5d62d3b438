"""Rotary positions of a frozen base on a GPU: a kernel for queries and one for keys, in place of ten that transformers
composes.

Shape legend: B sequences, S sequence length, K = B * S tokens, H heads, E head size, F = E / 2.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cascade_fast import ops
from cascade_fast.base.model import FAMILY

NAME = "apply_rotary_pos_emb"  # of transformers' modules, whose attention calls it


@contextlib.contextmanager
def fused_rotation(model: Any) -> Iterator[None]:
    """Within it ``model``, one of transformers' of the Llama family, turns queries and keys by ``ops.rotate_rows``,
    where it is on a GPU that has a kernel for it. The angles are the model's own, rounded as it rounds them; in 16 bit
    what is turned is rounded once, composed three times. On a CPU nothing changes."""
    module = sys.modules[type(model).__module__]
    known = model.config.model_type in FAMILY and hasattr(module, NAME)
    if model.device.type == "cpu" or not known or not ops.fused("rotate_rows", model.device):
        yield
        return
    rotary, rotation = model.model.rotary_emb, _Rotation(model, getattr(module, NAME))
    rotary.forward = rotation.angles
    setattr(module, NAME, rotation.turn)
    try:
        yield
    finally:
        setattr(module, NAME, rotation.composed)
        del rotary.forward


class _Rotation:
    """What stands in for a model's angles and for the function that turns by them."""

    def __init__(self, model: Any, composed: Any) -> None:
        self.rotary, self.heads, self.composed = model.model.rotary_emb, model.config.num_attention_heads, composed
        self.index_Y: Tensor  # every head stays in its place

    def angles(self, x_BSD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(K, F)`` float32, once for all layers; a model's own are ``(1 or B, S, E)``."""
        (batch, seq_len), own = x_BSD.shape[:2], type(self.rotary).forward(self.rotary, x_BSD, position_ids)
        self.index_Y = torch.arange(batch * seq_len * self.heads, device=x_BSD.device)
        cos_KF, sin_KF = (t[..., : t.shape[-1] // 2].float().expand(batch, -1, -1).flatten(0, 1) for t in own)
        return cos_KF, sin_KF

    def turn(self, query_BHSE: Tensor, key_BHSE: Tensor, *angles: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """transformers' ``apply_rotary_pos_emb``. Angles of another shape are another model's."""
        if angles[0].dim() != 2:
            return self.composed(query_BHSE, key_BHSE, *angles, **options)
        return self._turned(query_BHSE, *angles), self._turned(key_BHSE, *angles)

    def _turned(self, x_BHSE: Tensor, cos_KF: Tensor, sin_KF: Tensor) -> Tensor:
        batch, heads, seq_len, size = x_BHSE.shape
        rows = batch * seq_len * heads
        x_KHE = x_BHSE.transpose(1, 2).reshape(-1, heads, size)  # a view: so the projections have made it
        turned = ops.rotate_rows(
            x_KHE, cos_KF, sin_KF, self.index_Y[:rows], x_KHE.new_empty(1, size).expand(rows, size)
        )
        return turned.view(batch, seq_len, heads, size).transpose(1, 2)
