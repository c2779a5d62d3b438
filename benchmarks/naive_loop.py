"""The untouched baseline of every speed claim: the stage loop of the original experiment, as simple as it was.

A stage is a whole small ``LlamaForCausalLM``; every hard token is a sequence of length one; 32 tokens a step; fp32;
``torch.optim.AdamW`` with its defaults; ``loss.item()`` every step. Do not make it faster.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BATCH_TOKENS = 32
LR = 1e-4


def naive_stage(base_config, layers: int = 8, seed: int = 0) -> nn.Module:
    """A small language model of the base's architecture with random weights and its own tied head."""
    config = type(base_config).from_dict({**base_config.to_dict(), "num_hidden_layers": layers})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def naive_losses(
    model: nn.Module, hidden_ND: Tensor, label_N: Tensor, order: Iterable[Tensor], lr: float = LR
) -> list[float]:
    """Trains ``model`` on the batches of token numbers in ``order``; the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for picked in order:
        hidden_B1D, label_B = hidden_ND[picked].float().unsqueeze(1), label_N[picked]
        optimizer.zero_grad()
        logits_BV = model(inputs_embeds=hidden_B1D, return_dict=True).logits.squeeze(1)
        loss = nn.functional.cross_entropy(logits_BV, label_B)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
