"""The plan of a run: how it gets keys and values, the memory it takes and the time, on one device. Made once, and
handed on: the trainer says it, checks the disk with it and takes its micro batch; ``python -m cascade_fast.plan``
prints it.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_fast.base.base_pass import pass_folder
from cascade_fast.base.model import BaseModel, cache_folder
from cascade_fast.base.splits import SplitSequences
from cascade_fast.planning.counts import Shape
from cascade_fast.planning.devices import Device, this_machine
from cascade_fast.planning.disk import check_disk
from cascade_fast.planning.kv import choose_kv, kv_disk_bytes, kv_seconds
from cascade_fast.planning.memory import GIB, PROCESS_BYTES, MemoryPlan, memory_plan
from cascade_fast.planning.several import Several, plan_several, share_of_batch, share_of_text
from cascade_fast.planning.times import Time, base_pass_time, epoch_time
from cascade_fast.runtime.compute import Compute, resident_bytes
from cascade_fast.runtime.files import free_disk_bytes
from cascade_fast.runtime.processes import Processes, processes
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import base_needs, with_layers

PCIE_BYTES_PER_SECOND = 12e9  # third generation, 16 lanes, as copies reach


@dataclass(frozen=True)
class RunPlan:
    """What a run with ``settings`` takes on ``device``; of several, on each: its memory, and its share of the time.

    ``settings.kv`` is settled where a stage asks; ``kv_line`` says why, None where it was not ``auto``. So is
    ``settings.store`` beside a GPU.
    """

    settings: RunSettings
    base_config: Any  # transformers'
    device: Device
    memory: MemoryPlan
    base_pass: Time
    epoch: Time  # of stage 1, without validation
    kv_line: str | None
    several: Several | None = None  # more than one GPU

    @property
    def gpus(self) -> int:
        return 1 if self.several is None else self.several.gpus

    def of_first(self, these: Processes) -> "RunPlan":
        """With what the first process has settled: memory and disk, which it goes by, are not the same everywhere."""
        kv, store, micro = these.of_first([self.settings.kv, self.settings.store, self.memory.micro_batch_tokens])
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, kv=kv, store=store),
            memory=dataclasses.replace(self.memory, micro_batch_tokens=micro),
        )

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.device.memory_bytes, self.device.ram_bytes)

    @property
    def peak_line(self) -> str:
        """The peak beside the device's memory, each phase's, and whether the run fits."""
        phases = ", ".join(f"{phase.name} {gib(phase.peak)}" for phase in self.memory.phases)
        peak = f"peak {gib(self.memory.worst.peak)} GiB of {gib(self.device.memory_bytes)}"
        return f"{peak} ({phases}): {'fits' if self.fits else 'does NOT fit'}"

    @property
    def store_line(self) -> str | None:
        """Where a GPU reads hidden states; None on the CPU."""
        if self.device.on_cpu:
            return None
        size = self.memory.store_on_gpu
        return (
            f"store: device ({gib(size)} GiB)" if size else f"store: host ({gib(self.memory.ram_mapped)} GiB, mapped)"
        )

    def lines(self) -> list[str]:
        """What the trainer says of it."""
        batch, micro = share_of_batch(self.settings, self.gpus).batch_tokens, self.memory.micro_batch_tokens
        lines = [
            self.peak_line,
            f"base pass {_about(self.base_pass)}; an epoch of stage 1 {_about(self.epoch)}",
        ]
        if micro < batch:
            lines.append(f"a batch of {batch} tokens in {math.ceil(batch / micro)} parts of {micro}")
        lines += [line for line in (self.store_line, self.kv_line) if line is not None]
        return [f"plan: {line}" for line in lines]


def make_plan(
    settings: RunSettings,
    base_config: Any,
    device: Device,
    disk_bytes: float = math.inf,
    labelled_share: float = 1.0,
    gpus: int = 1,
) -> RunPlan:
    """The plan of a run on a base with transformers' configuration ``base_config``.

    Args:
        disk_bytes: free for the base pass; decides about ``kv: auto``.
        labelled_share: of the training tokens; where it is 1, so it is of the others.
        gpus: how many such devices share the text and every batch; any token may come to any of them.
    """
    settings, kv_line = _settle_kv(with_layers(settings, base_config), base_config, device, disk_bytes, labelled_share)

    def planned(store: str) -> MemoryPlan:
        return memory_plan(
            dataclasses.replace(share_of_batch(settings, gpus), store=store),
            base_config,
            dtype=device.dtype,
            on_cpu=device.on_cpu,
            memory_bytes=device.memory_bytes,
            fused_attention=device.fused_attention,
            process_bytes=max(PROCESS_BYTES, resident_bytes()),
            labelled_share=labelled_share,
            gpus=gpus,
        )

    memory = planned(settings.store)
    if not device.on_cpu and settings.store == "auto":  # on the GPU, if that leaves room for batches as large
        on_gpu = planned("device")
        fits = on_gpu.fits(device.memory_bytes, device.ram_bytes)
        chosen = "device" if fits and on_gpu.micro_batch_tokens == memory.micro_batch_tokens else "host"
        memory, settings = on_gpu if chosen == "device" else memory, dataclasses.replace(settings, store=chosen)
    share = share_of_text(share_of_batch(settings, gpus), gpus)
    epoch = epoch_time(share, base_config, device, memory.micro_batch_tokens, labelled_share, gpus)
    several = None
    if gpus > 1:
        several = plan_several(settings, base_config, device, memory, gpus, labelled_share)
        epoch = dataclasses.replace(epoch, all_reduces=several.steps * several.all_reduce_seconds)
    base_pass = base_pass_time(share, base_config, device, labelled_share)
    return RunPlan(settings, base_config, device, memory, base_pass, epoch, kv_line, several)


def plan_run(
    settings: RunSettings, base: BaseModel, sequences: SplitSequences, compute: Compute, out: Path, kv: str | None
) -> RunPlan:
    """The plan of a run on this machine that writes to ``out``.

    ``kv``: as it was settled when the run began; None for a new one. A run resumed on a fuller disk goes on as it
    began.

    Raises:
        InputError: the disk has no room for what the run will write.
    """
    cache = cache_folder(settings)
    if kv is not None:
        settings = dataclasses.replace(settings, kv=kv)
    train = sequences.splits["train"]
    share = train.labels / train.tokens
    gpus = processes().count
    plan = make_plan(settings, base.config, this_machine(compute), free_disk_bytes(cache), share, gpus)
    passed = pass_folder(base, sequences, plan.settings, base_needs(plan.settings), compute, cache)
    check_disk(plan.memory.disk, out=out, base_pass=passed)
    return plan


def _settle_kv(
    settings: RunSettings, base_config: Any, device: Device, disk_bytes: float, labelled_share: float
) -> tuple[RunSettings, str | None]:
    """``settings`` with ``kv: auto`` settled for ``device`` and so much free disk, and the line that says why."""
    if settings.kv != "auto":
        return settings, None
    if settings.easy_tokens == "forward":  # nothing is read in training; evaluation may, where tokens have no label
        return dataclasses.replace(settings, kv="recompute"), None
    shape = Shape.from_settings(settings, base_config, labelled_share)
    memory = shape.memory(settings, device.dtype.itemsize)
    if memory.kv_numbers == 0 or shape.needs.all_enter:
        return settings, None  # nobody asks
    read = device.bandwidth if device.on_cpu else PCIE_BYTES_PER_SECOND
    seconds = kv_seconds(memory, device.rate, read, device.ram_bytes)
    chosen, why = choose_kv(seconds, kv_disk_bytes(memory), disk_bytes)
    return dataclasses.replace(settings, kv=chosen), f"kv: {chosen} ({why})"


def _about(taken: Time) -> str:
    return f"at least {taken.seconds:.1f} s (limit: {taken.limit})"


def gib(size: float) -> str:
    """Bytes as GiB, two decimals."""
    return f"{size / GIB:.2f}"
