"""The compute ledger: what a run computed and how fast, beside a dense stage's work and the original recipe's.

Counted are the FLOPs a model *needs*, as in MFU (model FLOPs utilization, arXiv 2204.02311): two for each
multiply-add of a matrix product, twice that again for the gradients of its input and its weight, one of which a frozen
head does without.
Norms, softmax, optimizer and what is computed twice to save memory do not count; attention does over whole blocks. MFU
is their rate over that of a square product of the same dtype, probed on the same device when the run begins.
"""

import math
from typing import Any

from cascade_fast.planning.counts import Shape
from cascade_fast.planning.devices import this_machine
from cascade_fast.planning.times import base_flops, tokens_with_logits
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import SEED_PRESET, RunSettings


def seed_flops(settings: RunSettings, base_config: Any) -> float:
    """Of training the original recipe's stage of as many layers on one token: as a sequence of length one in
    transformers' layers, queries and keys included, with a head of its own."""
    shape = Shape.from_settings(settings, base_config)
    return 6 * (
        shape.stage.layers * (shape.counts.value_output_mlp() + shape.counts.query_key_matrices()) + shape.counts.head
    )


def matmul_rate(compute: Compute) -> float:
    """FLOP/s of a square product, probed once."""
    return this_machine(compute).flops[compute.dtype_name]


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


def stage_work(settings: RunSettings, base_config: Any, epochs: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Of a stage's training: every epoch's tokens, whether it was the best or not."""
    tokens, seconds = sum(e["tokens"] for e in epochs), sum(e["seconds"] for e in epochs)
    return work(tokens, settings.layers_per_stage, _stage_flops(settings, base_config), seconds, rate)


def compute_ledger(
    settings: RunSettings,
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
    shape, with_logits = (
        Shape.from_settings(settings, base_config),
        tokens_with_logits(settings, every, tokens["train"]),
    )
    flops = base_flops(shape, settings.seq_len, with_logits=False) + 2 * shape.counts.head * with_logits / max(every, 1)
    done = [stage["compute"] for stage in stages]
    training = {key: sum(line[key] for line in done) for key in ("tokens", "layer_tokens", "flops", "seconds")}
    training["mfu"] = training["flops"] / (training["seconds"] * rate) if training["seconds"] > 0 else None
    return {
        "matmul_flops_per_second": rate,
        "base_pass": work(every, base_layers, flops, base_pass_seconds, rate),
        "training": training,
        "compared": _compared(settings, base_config, tokens["train"], stages[0]) if training["tokens"] else {},
    }


def _stage_flops(settings: RunSettings, base_config: Any) -> int:
    return Shape.from_settings(settings, base_config).counts.training_flops(settings.seq_len)


def _compared(settings: RunSettings, base_config: Any, train_tokens: int, stage: dict[str, Any]) -> dict[str, Any]:
    ours, layers = stage["compute"], settings.layers_per_stage
    dense = train_tokens * len(stage["epochs"])

    def line(tokens: int, flops_a_token: float, batch_tokens: int) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "layer_tokens": tokens * layers,
            "flops": tokens * flops_a_token,
            "steps": math.ceil(tokens / batch_tokens),
        }

    return {
        "stage_1": line(ours["tokens"], _stage_flops(settings, base_config), settings.batch_tokens),
        "dense_stage": line(dense, _stage_flops(settings, base_config), settings.batch_tokens),
        "seed_recipe": line(ours["tokens"], seed_flops(settings, base_config), SEED_PRESET["batch_tokens"]),
    }
