"""What several GPUs change about a plan: each does its share, they add up gradients, and a stage too large for one must
be divided among them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cascade_fast.planning.counts import Shape, gradient_bytes, optimizer_bytes
from cascade_fast.planning.devices import Device
from cascade_fast.planning.memory import BASE_PASS_DISK, CONTEXT_BYTES, MemoryPlan, read_bytes
from cascade_fast.selection import hard_count
from cascade_fast.settings import SPLITS, RunSettings


@dataclass(frozen=True)
class Several:
    """Bytes and seconds of one GPU of ``gpus``, but where said otherwise.

    Attributes:
        steps: of an epoch of stage 1.
        gradient_bytes: of a stage; what a step adds up.
        link: bytes per second between GPUs, as assumed.
        stage_bytes: weights, gradients and optimizer state of a stage, whole.
        fits_one: whether one GPU has room for ``stage_bytes``.
        written_bytes: of hidden states, by the base pass.
        read_bytes: of the same, by an epoch of stage 1.
    """

    gpus: int
    steps: int
    gradient_bytes: float
    link: float
    stage_bytes: float
    fits_one: bool
    written_bytes: float
    read_bytes: float

    @property
    def all_reduce_bytes(self) -> float:
        """That a step sends, and receives: a ring's (P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms
        for clusters of workstations", 2009). Gradients of several parts of a batch are added up once."""
        return 2 * (self.gpus - 1) / self.gpus * self.gradient_bytes

    @property
    def all_reduce_seconds(self) -> float:
        """Of a step; without latency."""
        return self.all_reduce_bytes / self.link

    @property
    def sharded_bytes(self) -> float:
        """Of ``stage_bytes`` with ``--shard fsdp``."""
        return self.stage_bytes / self.gpus


def share_of_batch(settings: RunSettings, gpus: int) -> RunSettings:
    """``settings`` with the batch of one of ``gpus`` GPUs: ``batch_tokens`` is all of theirs."""
    return dataclasses.replace(settings, batch_tokens=math.ceil(settings.batch_tokens / gpus))


def share_of_text(settings: RunSettings, gpus: int) -> RunSettings:
    """``settings`` with one GPU's part of every split."""
    if gpus == 1:
        return settings
    size = settings.seq_len if settings.unit == "blocks" else 1
    parts: dict[str, Any] = {
        f"{split}_{settings.unit}": math.ceil(settings.expected_tokens(split) / size / gpus) for split in SPLITS
    }
    return dataclasses.replace(settings, **parts)


def plan_several(
    settings: RunSettings, base_config: Any, device: Device, memory: MemoryPlan, gpus: int, labelled_share: float
) -> Several:
    """``settings``: of the run; ``memory``: one GPU's plan."""
    shape, width = Shape.from_settings(settings, base_config, labelled_share), device.dtype.itemsize
    gradients = gradient_bytes(shape, width, halves=False)
    stage = 4.0 * shape.counts.parameters() + gradients + optimizer_bytes(shape, settings.optimizer)
    tokens = hard_count(settings.hard_ratio, round(settings.expected_tokens("train") * labelled_share))
    return Several(
        gpus=gpus,
        steps=math.ceil(tokens / settings.batch_tokens),
        gradient_bytes=gradients,
        link=device.link(gpus),
        stage_bytes=stage,
        fits_one=stage + CONTEXT_BYTES <= device.memory_bytes,
        written_bytes=memory.disk[BASE_PASS_DISK] / gpus,
        read_bytes=read_bytes(settings, shape, width) / gpus,
    )
