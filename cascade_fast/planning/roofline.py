"""How long a base pass and an epoch should take, and what limits them: a roofline over a small table of devices.

A time is the largest of three: floating-point operations over the rate of matrix products, bytes over the bandwidth,
and kernel launches times what one costs. Peaks are the vendor's; no program reaches them, so each is multiplied by an
assumed fraction, which the plan prints. These are estimates for choosing settings, not measurements.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cascade_fast.criteria import get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.losses import chunk_tokens
from cascade_fast.planning.counts import Shape, base_weight_bytes, saved_activation_bytes
from cascade_fast.planning.kv import choose_kv, kv_disk_bytes, kv_seconds, recompute_flops
from cascade_fast.planning.memory import (
    GIB,
    PROCESS_BYTES,
    MemoryPlan,
    base_tokens_at_once,
    memory_plan,
)
from cascade_fast.runtime.compute import Compute, choose_device, choose_dtype, dtype_name, ram_bytes, resident_bytes
from cascade_fast.selection import hard_count
from cascade_fast.settings import RunSettings

PROBE_SECONDS = 0.2
PCIE_BYTES_PER_SECOND = 12e9  # third generation, 16 lanes, as copies reach
# Kernels in eager mode, counted with TorchDispatchMode: of a base layer's forward about 30 (queries, keys and rotary
# embedding more than a stage's); of a chunk of logits about 10.
BASE_LAYER_LAUNCHES, CHUNK_LAUNCHES = 30, 10


@dataclass(frozen=True)
class Device:
    """What a run computes on. ``flops``: dtype name -> peak FLOP/s; ``*_fraction``: what of a peak is assumed."""

    name: str
    on_cpu: bool
    memory_bytes: float
    ram_bytes: float
    flops: dict[str, float]
    bytes_per_second: float
    flops_fraction: float
    bandwidth_fraction: float
    launch_seconds: float
    dtype: torch.dtype  # what ``dtype: auto`` takes there
    fused_attention: bool = True
    here: bool = False  # this machine's own

    def rate(self, dtype: torch.dtype) -> float:
        return self.flops[dtype_name(dtype)] * self.flops_fraction


def _gpu(name: str, memory: float, ram: float, half: float, single: float, bandwidth: float, capability: int) -> Device:
    bfloat16 = half if capability >= 80 else single  # emulated below sm_80
    return Device(
        name,
        on_cpu=False,
        memory_bytes=memory * GIB,
        ram_bytes=ram * GIB,
        flops={"float16": half, "bfloat16": bfloat16, "float32": single},
        bytes_per_second=bandwidth,
        # Fractions of peak: assumptions. Eager matrix products of these sizes reach a third to a half, copies 70-80 %.
        flops_fraction=0.4,
        bandwidth_fraction=0.7,
        launch_seconds=10e-6,  # eager PyTorch on a cloud host's CPU: 5 to 10 us a kernel
        dtype=torch.bfloat16 if capability >= 80 else torch.float16,
        fused_attention=capability >= 80,
    )


# NVIDIA's peaks, dense (no sparsity), of 16-bit products accumulated in float32, as torch's are. Data sheets: T4 "65
# TFLOPS mixed precision, 8.1 single, 320 GB/s"; L4 "121 TFLOPS FP16 (242 with sparsity), 30.3 FP32, 300 GB/s, 24 GB";
# A100 40GB "312 TFLOPS FP16, 19.5 FP32, 1,555 GB/s"; V100 SXM2 "125 TFLOPS deep learning, 15.7 single-precision, 900
# GB/s, 16 GB"; H100 SXM "1,979 TFLOPS FP16 with sparsity", half without, "67 FP32, 3.35 TB/s, 80 GB". Whitepapers,
# appendix A, "Peak FP16 Tensor TFLOPS with FP32 Accumulate", which is half of a GeForce's peak with FP16 accumulate:
# RTX 3090 (GA102) "71, with sparsity 142; FP32 35.6; 936 GB/sec"; RTX 4090 (Ada) "165.2/330.4; 82.6; 1008 GB/sec".
# Memory: the total that torch reports (14.56 GiB of a T4's 16 GB; GeForce: under Linux with a recent driver).
# Host RAM: Google Colab's machines for t4, l4, a100. Beside a V100 AWS p3.2xlarge's 61 GiB; beside an H100 or a GeForce
# a guess.
DEVICES = {
    "t4": _gpu("Tesla T4", 14.56, 12.7, 65e12, 8.1e12, 320e9, 75),
    "l4": _gpu("L4", 22.16, 53.0, 121e12, 30.3e12, 300e9, 89),
    "a100": _gpu("A100 40GB", 39.56, 83.5, 312e12, 19.5e12, 1555e9, 80),
    "v100": _gpu("Tesla V100 SXM2 16GB", 15.77, 61.0, 125e12, 15.7e12, 900e9, 70),
    "h100": _gpu("H100 SXM 80GB", 79.1, 200.0, 989.4e12, 66.9e12, 3350e9, 90),
    "rtx3090": _gpu("GeForce RTX 3090", 23.57, 32.0, 71e12, 35.6e12, 936e9, 86),
    "rtx4090": _gpu("GeForce RTX 4090", 23.52, 32.0, 165.2e12, 82.6e12, 1008e9, 89),
}
ASSUMED_RAM_GIB = 32.0  # beside a GPU given by its numbers


def find_device(
    asked: str,
    dtype: str,
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    gbs: float | None = None,
    ram_gib: float | None = None,
) -> tuple[Device, torch.dtype]:
    """The device of a plan, and the compute dtype there: one of the table by name, this machine's (``cpu``, ``cuda``,
    ``auto``), or with ``auto`` and the three numbers a GPU that has them (compute capability 8.0 or more: bfloat16).

    Args:
        dtype: ``RunSettings.dtype``.
        memory_gib, tflops, gbs: memory in GiB, peak TFLOP/s of the compute dtype and bandwidth in GB/s: of the GPU, or
            instead of the table's or this machine's probed ones.
        ram_gib: host RAM in GiB, instead of the table's, the assumed or this machine's.

    Raises:
        InputError: no such device, or some of the three numbers and no device that they belong to.
    """
    numbers = {"memory_gib": memory_gib, "tflops": tflops, "gbs": gbs}
    missing = [name for name, value in numbers.items() if value is None]
    if asked == "auto" and len(missing) < len(numbers):
        if missing:
            raise InputError(
                f"{', '.join(missing)}: not given; without a device, a GPU needs memory_gib, tflops and gbs (to change "
                f"one number only, name the device: cpu, cuda, {', '.join(DEVICES)})"
            )
        name = f"a GPU with {memory_gib:g} GiB, {tflops:g} TFLOP/s, {gbs:g} GB/s"
        device = _gpu(name, 0.0, ASSUMED_RAM_GIB, 0.0, 0.0, 0.0, 80)  # its numbers follow
    elif asked in DEVICES:
        device = DEVICES[asked]
    else:
        try:
            here = choose_device(asked)
        except InputError as error:
            raise InputError(f"{error}; or one of {', '.join(DEVICES)}") from None
        device = this_machine(Compute(here, *choose_dtype(here, dtype)), probe=tflops is None or gbs is None)
    compute = device.dtype if dtype == "auto" else getattr(torch, dtype)
    changes: dict[str, Any] = {}
    if tflops is not None:
        changes["flops"] = dict.fromkeys(("float16", "bfloat16", "float32"), tflops * 1e12)
    if gbs is not None:
        changes["bytes_per_second"] = gbs * 1e9
    if memory_gib is not None:
        changes["memory_bytes"] = memory_gib * GIB
    if ram_gib is not None:
        changes["ram_bytes"] = ram_gib * GIB
    return dataclasses.replace(device, **changes), compute


@functools.cache
def this_machine(compute: Compute, *, probe: bool = True) -> Device:
    """This machine's CPU or GPU: memory as the system tells it, rates measured by a probe of half a second."""
    device = compute.device
    on_cpu = device.type == "cpu"
    flops = _probe_flops(device, compute.dtype) if probe else 1.0
    bandwidth = _probe_bandwidth(device) if probe else 1.0
    fused = on_cpu or torch.cuda.get_device_capability(device) >= (8, 0)
    return Device(
        f"this machine's CPU, {torch.get_num_threads()} thread(s)" if on_cpu else compute.device_name,
        on_cpu=on_cpu,
        memory_bytes=compute.memory_bytes(),
        ram_bytes=ram_bytes(),
        flops={compute.dtype_name: flops},
        bytes_per_second=bandwidth,
        flops_fraction=0.7,  # of the probe's square product, which flatters thin ones
        bandwidth_fraction=0.7,
        launch_seconds=5e-6 if on_cpu else 10e-6,
        dtype=compute.dtype,
        fused_attention=fused,
        here=True,
    )


def _probe_flops(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.ones(768, 768, device=device, dtype=dtype) for _ in range(2))
    return 2 * 768**3 / _seconds(lambda: a @ b, device)


def _probe_bandwidth(device: torch.device) -> float:
    source = torch.zeros(2**24, device=device)  # 64 MiB: beyond the caches
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        best = min(best, once())
    return best


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds by each limit; the largest counts."""

    flops: float
    bytes: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.flops, self.bytes, self.launches)

    @property
    def limit(self) -> str:
        return max(("FLOPs", self.flops), ("bytes", self.bytes), ("launches", self.launches), key=lambda pair: pair[1])[
            0
        ]


def base_pass_time(settings: RunSettings, base_config: Any, device: Device, dtype: torch.dtype) -> Time:
    """The base over every block of every split; logits where the loss or the criterion needs them."""
    shape, width = Shape.from_settings(settings, base_config), dtype.itemsize
    s, layers, seq = shape.stage, base_config.num_hidden_layers, settings.seq_len
    test = settings.val_blocks if settings.test_blocks is None else settings.test_blocks
    tokens = (settings.train_blocks + settings.val_blocks + test) * seq
    with_logits = tokens_with_logits(settings, tokens, settings.train_blocks * seq)
    at_once = base_tokens_at_once(settings, device.on_cpu)
    passes = math.ceil(tokens / at_once)
    flops = tokens * base_flops(shape, seq, with_logits=False) + with_logits * 2 * shape.counts.head
    weights = base_weight_bytes(shape, settings.base_quantization, width)
    if settings.base_quantization == "nf4":  # every product writes and reads the weights it unpacks
        weights += 2 * width * shape.base_quantized()
    per_token = layers * width * (14 * s.hidden_size + 7 * s.intermediate_size)
    moved = passes * weights + tokens * per_token + with_logits * s.vocab_size * (2 * width + 7 * 4)
    launches = passes * layers * BASE_LAYER_LAUNCHES + with_logits / chunk_tokens(s.vocab_size, dtype) * CHUNK_LAUNCHES
    return _time(flops, moved, launches, device, dtype)


def base_flops(shape: Shape, seq_len: int, *, with_logits: bool) -> int:
    """Of a token in the base; masked scores are computed too."""
    attention = 4 * shape.base.num_hidden_layers * seq_len * shape.counts.attention_inner
    return 2 * shape.base_quantized() + attention + (2 * shape.counts.head if with_logits else 0)


def tokens_with_logits(settings: RunSettings, tokens: int, train_tokens: int) -> int:
    """Of the ``tokens`` of a base pass: the training tokens' logits are made where their scores come from them."""
    return tokens if get_criterion(settings.criterion).in_base_pass.needs_logits else tokens - train_tokens


def epoch_time(settings: RunSettings, base_config: Any, device: Device, dtype: torch.dtype, micro: int) -> Time:
    """An epoch of stage 1 over its hard tokens, without validation."""
    shape, width = Shape.from_settings(settings, base_config), dtype.itemsize
    s, trained = shape.stage, shape.counts.trained()
    tokens = hard_count(settings.hard_ratio, settings.train_blocks * settings.seq_len)
    steps = math.ceil(tokens / settings.batch_tokens)
    parts = steps * math.ceil(settings.batch_tokens / micro)
    matrices = shape.counts.matrices()
    flops: float = tokens * shape.counts.training_flops(settings.seq_len)
    step_bytes = trained * (28 if settings.optimizer == "adamw" else 16)  # weights, gradient, state: read and written
    if settings.grad_clip > 0:
        step_bytes += 12 * trained
    casts = (4 + width) * matrices if width < 4 else 0
    part_bytes = casts + matrices * (2 * width + 4 + (2 * width if width < 4 else 0)) + 2 * shape.counts.head * width
    activations = s.layers * 4 * saved_activation_bytes(shape, width)  # each written and read, there and back
    token_bytes = activations + s.vocab_size * (3 * width + 6 * 4)
    moved: float = steps * step_bytes + parts * part_bytes + tokens * token_bytes
    chunks = max(parts, tokens / chunk_tokens(s.vocab_size, dtype))
    memory = shape.kind.memory(settings, shape.stage, width)
    moved += steps * 4 * memory.training_bytes(settings.batch_tokens, device.on_cpu)
    if settings.kv == "recompute":
        flops += recompute_flops(memory)
    launches = parts * (s.layers * shape.counts.layer_launches + 50) + chunks * CHUNK_LAUNCHES + steps * 30
    return _time(flops, moved, launches, device, dtype)


def _time(flops: float, moved: float, launches: float, device: Device, dtype: torch.dtype) -> Time:
    return Time(
        flops / device.rate(dtype),
        moved / (device.bytes_per_second * device.bandwidth_fraction),
        launches * device.launch_seconds,
    )


# --- the short form ---------------------------------------------------------------------------------------------------


def with_kv(
    settings: RunSettings, base_config: Any, device: Device, dtype: torch.dtype, disk_bytes: float = math.inf
) -> tuple[RunSettings, list[str]]:
    """``settings`` with ``kv: auto`` settled for ``device`` and so much free disk, and the line that says why."""
    if settings.kv != "auto":
        return settings, []
    shape = Shape.from_settings(settings, base_config)
    memory = shape.kind.memory(settings, shape.stage, dtype.itemsize)
    if memory.kv_numbers == 0:
        return settings, []  # nobody asks
    rates = device.rate(dtype), device.bytes_per_second * device.bandwidth_fraction
    if not device.on_cpu:  # over PCIe
        rates = rates[0], PCIE_BYTES_PER_SECOND
    chosen, why = choose_kv(kv_seconds(memory, *rates, device.ram_bytes), kv_disk_bytes(memory), disk_bytes)
    return dataclasses.replace(settings, kv=chosen), [f"kv: {chosen} ({why})"]


def plan_for_run(settings: RunSettings, base_config: Any, compute: Compute) -> tuple[MemoryPlan, list[str]]:
    """The plan of a run on this machine (``kv`` settled), and the lines the trainer says of it."""
    machine, dtype = this_machine(compute), compute.dtype
    plan = plan_on(settings, base_config, machine, dtype)
    lines = [f"plan: {short_memory(plan, machine)}"]
    base = base_pass_time(settings, base_config, machine, dtype)
    epoch = epoch_time(settings, base_config, machine, dtype, plan.micro_batch_tokens)
    lines.append(f"plan: base pass {_about(base)}; an epoch of stage 1 {_about(epoch)}")
    if plan.micro_batch_tokens < settings.batch_tokens:
        parts = math.ceil(settings.batch_tokens / plan.micro_batch_tokens)
        lines.append(f"plan: a batch of {settings.batch_tokens} tokens in {parts} parts of {plan.micro_batch_tokens}")
    return plan, lines


def plan_on(settings: RunSettings, base_config: Any, device: Device, dtype: torch.dtype) -> MemoryPlan:
    """:func:`memory_plan` for ``device``."""
    return memory_plan(
        settings,
        base_config,
        dtype=dtype,
        on_cpu=device.on_cpu,
        memory_bytes=device.memory_bytes,
        fused_attention=device.fused_attention,
        process_bytes=max(PROCESS_BYTES, resident_bytes()),
    )


def short_memory(plan: MemoryPlan, device: Device) -> str:
    fits = "fits" if plan.fits(device.memory_bytes, device.ram_bytes) else "does NOT fit"
    phases = ", ".join(f"{phase.name} {gib(phase.peak)}" for phase in plan.phases)
    return f"peak {gib(plan.worst.peak)} GiB of {gib(device.memory_bytes)} ({phases}): {fits}"


def _about(taken: Time) -> str:
    return f"at least {taken.seconds:.1f} s (limit: {taken.limit})"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
