"""Attention of a frozen base on older GPUs: keys and values repeated for every head that reads them.

Below compute capability 8.0 only PyTorch's math kernel takes grouped heads: a dozen launches, and all scores in memory.
The memory-efficient kernel takes the same with repeated keys and values.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "cascade_fast_expanded_heads"  # among transformers' attention functions


@contextlib.contextmanager
def expanded_heads(model: Any) -> Iterator[None]:
    """Within it ``model``, one of transformers' that attends with ``sdpa``, repeats its keys and values, where it is
    on a GPU of compute capability below 8.0. Elsewhere nothing changes."""
    config = model.config
    before = config._attn_implementation
    if model.device.type == "cpu" or before != "sdpa" or torch.cuda.get_device_capability(model.device) >= (8, 0):
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa_attention_forward``, of heads that are not grouped any more."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    key, value = (repeat_kv(t, module.num_key_value_groups) for t in (key, value))
    ungrouped: Any = SimpleNamespace(is_causal=module.is_causal)
    return sdpa_attention_forward(ungrouped, query, key, value, attention_mask, **options)
