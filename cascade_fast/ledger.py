"""The compute ledger: what a run computed and how fast, beside a dense stage's work and the original recipe's.

Counted are the FLOPs a model *needs*, as in MFU (model FLOPs utilization, arXiv 2204.02311): two for each
multiply-add of a matrix product, twice that again for the gradients of its input and its weight, one of which a frozen
head does without. Norms, softmax, optimizer and what is computed twice to save memory do not count. MFU is their rate
over that of a square product of the same dtype, probed on the same device when the run begins.
"""

import math
from typing import Any

import torch

from cascade_fast.config import SEED_PRESET, RunConfig
from cascade_fast.parameter_counts import Shape
from cascade_fast.roofline import this_machine


def base_flops(config: RunConfig, base_config: Any, *, with_logits: bool) -> float:
    """Of one token in the base, in a block of ``seq_len``; causal attention sees half of it on average."""
    shape = Shape.of(config, base_config)
    attention = base_config.num_hidden_layers * 2 * config.seq_len * shape.attention_inner
    return 2 * shape.base_quantized() + attention + (2 * shape.head if with_logits else 0)


def stage_flops(config: RunConfig, base_config: Any) -> float:
    """Of training a stage on one token."""
    shape = Shape.of(config, base_config)
    s = shape.stage
    layers = 6 * shape.stage_matrices()
    if shape.attends:
        layers += s.layers * 6 * config.seq_len * shape.attention_inner
    return layers + (6 if s.head == "own" else 4) * shape.head


def seed_flops(config: RunConfig, base_config: Any) -> float:
    """Of training the original recipe's stage of as many layers on one token: as a sequence of length one in
    transformers' layers, queries and keys included, with a head of its own."""
    shape = Shape.of(config, base_config)
    s = shape.stage
    query_key = s.hidden_size * (shape.attention_inner + s.kv_heads * s.head_dim)
    return 6 * (s.layers * (shape.value_output_mlp() + query_key) + shape.head)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square product on ``device``, probed once."""
    return this_machine(device, dtype).flops[str(dtype).removeprefix("torch.")]


def work(tokens: int, layers: int, flops_a_token: float, seconds: float, rate: float) -> dict[str, Any]:
    """One line of the ledger. ``layer_tokens``: tokens times layers they went through."""
    flops = tokens * flops_a_token
    return {
        "tokens": tokens,
        "layer_tokens": tokens * layers,
        "flops": flops,
        "seconds": seconds,
        "mfu": flops / (seconds * rate) if seconds > 0 else None,
    }


def stage_work(config: RunConfig, base_config: Any, epochs: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Of a stage's training: every epoch's tokens, whether it was the best or not."""
    tokens, seconds = sum(e["tokens"] for e in epochs), sum(e["seconds"] for e in epochs)
    return work(tokens, config.layers_per_stage, stage_flops(config, base_config), seconds, rate)


def compute_ledger(
    config: RunConfig,
    base_config: Any,
    *,
    tokens: dict[str, int],
    base_pass_seconds: float,
    stages: list[dict[str, Any]],
    rate: float,
) -> dict[str, Any]:
    """``compute`` of ``results.json``.

    Args:
        tokens: of each split.
        base_pass_seconds: of the base pass, also where an earlier run has made it.
        stages: their records, in order.
        rate: see :func:`matmul_rate`.

    Returns:
        ``base_pass``, ``training`` (all stages) and ``compared``: stage 1 beside a dense stage of its kind and shape,
        trained on every token for as many epochs, and beside the original recipe's stage on the same tokens; empty
        where no epoch was finished.
    """
    every = sum(tokens.values())
    base_layers = base_config.num_hidden_layers
    with_logits = every if config.criterion == "entropy" else every - tokens["train"]
    flops = (
        with_logits * base_flops(config, base_config, with_logits=True)
        + (every - with_logits) * base_flops(config, base_config, with_logits=False)
    ) / max(every, 1)
    done = [stage["compute"] for stage in stages]
    training = {key: sum(line[key] for line in done) for key in ("tokens", "layer_tokens", "flops", "seconds")}
    training["mfu"] = training["flops"] / (training["seconds"] * rate) if training["seconds"] > 0 else None
    return {
        "matmul_flops_per_second": rate,
        "base_pass": work(every, base_layers, flops, base_pass_seconds, rate),
        "training": training,
        "compared": _compared(config, base_config, tokens["train"], stages[0]) if training["tokens"] else {},
    }


def _compared(config: RunConfig, base_config: Any, train_tokens: int, stage: dict[str, Any]) -> dict[str, Any]:
    ours, layers = stage["compute"], config.layers_per_stage
    dense = train_tokens * len(stage["epochs"])

    def line(tokens: int, flops_a_token: float, batch_tokens: int) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "layer_tokens": tokens * layers,
            "flops": tokens * flops_a_token,
            "steps": math.ceil(tokens / batch_tokens),
        }

    return {
        "stage_1": line(ours["tokens"], stage_flops(config, base_config), config.batch_tokens),
        "dense_stage": line(dense, stage_flops(config, base_config), config.batch_tokens),
        "seed_recipe": line(ours["tokens"], seed_flops(config, base_config), SEED_PRESET["batch_tokens"]),
    }
