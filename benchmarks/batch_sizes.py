"""A step of the default preset by the tokens in it: tokens a second, and memory beside a plain step's.

The plain step makes all logits at once and lets autograd keep them, as ``torch.nn.functional.cross_entropy``
does. ``python -m benchmarks.stage_training --batches`` runs it.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, workload
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.runtime.compute import choose_dtype, keep_freed_memory
from cascade_fast.settings import make_settings
from cascade_fast.training.stage_trainer import StageTrainer

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PLAIN_SIZES = SIZES[:6]  # beyond them the plain step takes gigabytes


def forward_backward(trainer: StageTrainer, tokens: int, *, plain: bool) -> None:
    stage, dtype = trainer.module, trainer.compute.dtype
    inputs, label_N = trainer.train.batch(torch.arange(tokens), trainer.device)
    with trainer.compute.autocast():
        _, normed_ND = stage(inputs)
        if plain:
            loss: Tensor = torch.nn.functional.cross_entropy(normed_ND.to(dtype) @ stage.head.T, label_N)
        else:
            loss = linear_cross_entropy(normed_ND, stage.head, label_N, dtype=dtype)
    loss.backward()
    trainer.optimizer.zero_grad(set_to_none=True)


def measure(rounds: int) -> dict[str, Any]:
    """``tokens_per_second`` {size: p20, p50, p80}; ``bytes``, ``plain_bytes`` {size: peak of forward and backward}."""
    keep_freed_memory()
    dtype, _ = choose_dtype(workload.CPU, "auto")
    with tempfile.TemporaryDirectory() as name:
        variants, trainers = {}, {}
        for size in SIZES:
            one = workload.trainer(make_settings({"batch_tokens": size}), Path(name) / str(size), dtype)
            trainers[size], variants[str(size)] = one, workload.steps_of(one, 1)
        seconds = common.interleaved(variants, rounds)
        memory: dict[str, dict[int, int]] = {"bytes": {}, "plain_bytes": {}}
        for size in SIZES:
            for key, plain in (("bytes", False), ("plain_bytes", True)):
                if plain and size not in PLAIN_SIZES:
                    continue
                one = trainers[size]
                memory[key][size], _ = common.peak_bytes(lambda: forward_backward(one, size, plain=plain))  # noqa: B023
    rates = {size: common.percentiles([size / s for s in seconds[str(size)]]) for size in SIZES}
    return {"tokens_per_second": rates, **memory}


def show(measured: dict[str, Any]) -> None:
    common.print_table("tokens a second by batch size", list(measured["tokens_per_second"].items()), "tokens/s")
    for size, peak in measured["bytes"].items():
        plain = measured["plain_bytes"].get(size)
        print(f"  {size:>6} tokens: {peak / 2**20:8.0f} MiB" + (f", plain {plain / 2**20:8.0f} MiB" if plain else ""))
