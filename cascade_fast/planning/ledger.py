"""The compute ledger: what a run computed and how fast, beside a dense stage's work and the original recipe's.

Counted are the FLOPs a model *needs*, as in MFU (model FLOPs utilization, arXiv 2204.02311): two for each
multiply-add of a matrix product, twice that again for the gradients of its input and its weight, one of which frozen
weights do without.
Norms, softmax, optimizer and what is computed twice to save memory do not count; attention does over whole blocks. MFU
is their rate over that of a square product of the same dtype, probed on the same device when the run begins.
"""

import math
from typing import Any

from cascade_fast.planning.counts import Shape
from cascade_fast.planning.devices import this_machine
from cascade_fast.planning.times import base_layer_flops, tokens_with_logits
from cascade_fast.presets import SEED_PRESET
from cascade_fast.records import Compared, ComparedWork, Epoch, Ledger, SplitTokens, StageRecord, Work
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import SPLITS, RunSettings


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


def work(tokens: int, layers: int, flops_a_token: float, seconds: float, rate: float) -> Work:
    """A line of the ledger: ``tokens`` through ``layers``."""
    flops = tokens * flops_a_token
    return Work(
        tokens=tokens, layer_tokens=tokens * layers, flops=flops, seconds=seconds, mfu=_mfu(flops, seconds, rate)
    )


def _mfu(flops: float, seconds: float, rate: float) -> float | None:
    return flops / (seconds * rate) if seconds > 0 else None


def stage_work(settings: RunSettings, base_config: Any, epochs: list[Epoch], rate: float) -> Work:
    """Of a stage's training: every epoch's tokens, whether it was the best or not."""
    tokens, seconds = sum(e.tokens for e in epochs), sum(e.seconds for e in epochs)
    return work(tokens, settings.layers_per_stage, _stage_flops(settings, base_config), seconds, rate)


def compute_ledger(
    settings: RunSettings,
    base_config: Any,
    *,
    tokens: SplitTokens,
    base_pass_seconds: float,
    stages: list[StageRecord],
    rate: float,
    general: int = 0,
) -> Ledger:
    """``compute`` of ``results.json``.

    Args:
        base_pass_seconds: of the base pass, also where an earlier run has made it.
        stages: their records, in order.
        rate: see :func:`matmul_rate`.
        general: tokens of other text in the base pass.
    """
    every = sum(settings.expected_tokens(split) for split in SPLITS) + general  # with those that are only read
    shape = Shape.from_settings(settings, base_config, (tokens.total + general) / max(every, 1))
    layer_tokens = shape.base_layer_tokens(every, settings.expected_tokens("train"))
    with_logits = tokens_with_logits(settings, shape, tokens.total + general, tokens.train)
    base_pass_flops = layer_tokens * base_layer_flops(shape, settings.seq_len) + 2.0 * shape.counts.head * with_logits
    done = [stage.compute for stage in stages if stage.compute is not None]
    total_flops, seconds = sum(line.flops for line in done), sum(line.seconds for line in done)
    training = Work(
        tokens=sum(line.tokens for line in done),
        layer_tokens=sum(line.layer_tokens for line in done),
        flops=total_flops,
        seconds=seconds,
        mfu=_mfu(total_flops, seconds, rate),
    )
    dense_tokens = tokens.train * len(stages[0].epochs) if stages else 0
    return Ledger(
        matmul_flops_per_second=rate,
        base_pass=Work(
            tokens=every,
            layer_tokens=layer_tokens,
            flops=base_pass_flops,
            seconds=base_pass_seconds,
            mfu=_mfu(base_pass_flops, base_pass_seconds, rate),
        ),
        training=training,
        compared=_compared(settings, base_config, done[0].tokens, dense_tokens) if training.tokens else None,
    )


def _stage_flops(settings: RunSettings, base_config: Any) -> int:
    return Shape.from_settings(settings, base_config).step_flops(settings)


def _compared(settings: RunSettings, base_config: Any, tokens: int, dense_tokens: int) -> Compared:
    """``tokens``: that stage 1 was trained on, every epoch's; ``dense_tokens``: as many epochs of all tokens."""

    def line(tokens: int, flops_a_token: float, batch_tokens: int) -> ComparedWork:
        return ComparedWork(
            tokens=tokens,
            layer_tokens=tokens * settings.layers_per_stage,
            flops=tokens * flops_a_token,
            steps=math.ceil(tokens / batch_tokens),
        )

    return Compared(
        stage_1=line(tokens, _stage_flops(settings, base_config), settings.batch_tokens),
        dense_stage=line(dense_tokens, _stage_flops(settings, base_config), settings.batch_tokens),
        seed_recipe=line(tokens, seed_flops(settings, base_config), SEED_PRESET["batch_tokens"]),
    )
