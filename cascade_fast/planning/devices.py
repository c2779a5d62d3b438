"""What a run can compute on: a table of GPUs, any other by its numbers, and this machine, whose rates are probed.

Peaks are the vendor's; no program reaches them, so each is multiplied by an assumed fraction, which the plan prints.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cascade_fast.input_checks import InputError
from cascade_fast.planning.memory import GIB
from cascade_fast.runtime.compute import Compute, dtype_name, ram_bytes, wait_for

GPUS_A_MACHINE = 8
PROBE_SECONDS = 0.2
PROBE_QUEUE = 20  # calls that a GPU is given before the host waits for it
PROBE_ENOUGH_SECONDS = 0.01  # of one product


@dataclass(frozen=True)
class Device:
    """What a run computes on, and in which dtype.

    ``flops``: dtype name -> peak FLOP/s; ``bytes_per_second``: peak bandwidth of its memory; ``*_fraction``: what of a
    peak is assumed; ``link_bytes_per_second``: peak between the GPUs of a machine, one way; ``network_...``: between
    machines.
    """

    name: str
    on_cpu: bool
    memory_bytes: float
    ram_bytes: float
    flops: dict[str, float]
    bytes_per_second: float
    flops_fraction: float
    bandwidth_fraction: float
    launch_seconds: float
    dtype: torch.dtype  # of matrix products
    fused_attention: bool = True
    link_bytes_per_second: float = 16e9  # PCIe of the third generation, 16 lanes
    network_bytes_per_second: float = 12.5e9  # 100 Gbit/s
    here: bool = False  # this machine's own
    ram_assumed: bool = False  # neither read nor given

    @property
    def rate(self) -> float:
        """FLOP/s of matrix products that a run is assumed to reach."""
        return self.flops[dtype_name(self.dtype)] * self.flops_fraction

    @property
    def bandwidth(self) -> float:
        """Bytes per second of its memory that a run is assumed to reach."""
        return self.bytes_per_second * self.bandwidth_fraction

    def link(self, gpus: int) -> float:
        """Bytes per second that a ring of so many GPUs is assumed to reach: its slowest link's."""
        among = self.link_bytes_per_second
        slowest = among if gpus <= GPUS_A_MACHINE else min(among, self.network_bytes_per_second)
        return slowest * self.bandwidth_fraction


def _gpu(
    name: str,
    memory: float,
    ram: float,
    half: float,
    single: float,
    bandwidth: float,
    capability: int,
    link: float,
    network: float = 12.5e9,
) -> Device:
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
        link_bytes_per_second=link,
        network_bytes_per_second=network,
        ram_assumed=True,
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
# Links, one way, half of what the data sheets add up: T4 "x16 PCIe Gen3, 32 GB/s"; L4 "PCIe Gen4 x16, 64 GB/s", which
# the GeForces have, too; V100 SXM2 "NVLink 300 GB/s"; A100 "NVLink 600 GB/s"; H100 SXM "NVLink 900 GB/s". Networks of a
# machine: AWS p4d (A100) "400 Gbps", p5 (H100) "3200 Gbps"; else 100 Gbit/s, assumed.
DEVICES = {
    "t4": _gpu("Tesla T4", 14.56, 12.7, 65e12, 8.1e12, 320e9, 75, 16e9),
    "l4": _gpu("L4", 22.16, 53.0, 121e12, 30.3e12, 300e9, 89, 32e9),
    "a100": _gpu("A100 40GB", 39.56, 83.5, 312e12, 19.5e12, 1555e9, 80, 300e9, 50e9),
    "v100": _gpu("Tesla V100 SXM2 16GB", 15.77, 61.0, 125e12, 15.7e12, 900e9, 70, 150e9),
    "h100": _gpu("H100 SXM 80GB", 79.1, 200.0, 989.4e12, 66.9e12, 3350e9, 90, 450e9, 400e9),
    "rtx3090": _gpu("GeForce RTX 3090", 23.57, 32.0, 71e12, 35.6e12, 936e9, 86, 32e9),
    "rtx4090": _gpu("GeForce RTX 4090", 23.52, 32.0, 165.2e12, 82.6e12, 1008e9, 89, 32e9),
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
    link_gbs: float | None = None,
) -> Device:
    """The device of a plan: one of the table by name, this machine's (``cpu``, ``cuda``, ``auto``), or with ``auto``
    and the three numbers a GPU that has them (compute capability 8.0 or more: bfloat16).

    Args:
        asked, dtype: ``RunSettings.device`` and ``dtype``.
        memory_gib, tflops, gbs: memory in GiB, peak TFLOP/s of the compute dtype and bandwidth in GB/s: of the GPU, or
            instead of the table's or this machine's probed ones.
        ram_gib: host RAM in GiB, instead of the table's, the assumed or this machine's.
        link_gbs: bandwidth between GPUs in GB/s, one way, whatever their number; likewise.

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
        device = _gpu(name, 0.0, ASSUMED_RAM_GIB, 0.0, 0.0, 0.0, 80, 32e9)  # its numbers follow
    elif asked in DEVICES:
        device = DEVICES[asked]
    else:
        try:
            compute = Compute.choose(asked, dtype)
        except InputError as error:
            raise InputError(f"{error}; or one of {', '.join(DEVICES)}") from None
        device = this_machine(compute, probe=tflops is None or gbs is None)
    changes: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if tflops is not None:
        changes["flops"] = dict.fromkeys(("float16", "bfloat16", "float32"), tflops * 1e12)
    if gbs is not None:
        changes["bytes_per_second"] = gbs * 1e9
    if memory_gib is not None:
        changes["memory_bytes"] = memory_gib * GIB
    if link_gbs is not None:
        changes |= dict.fromkeys(("link_bytes_per_second", "network_bytes_per_second"), link_gbs * 1e9)
    if ram_gib is not None:
        changes |= {"ram_bytes": ram_gib * GIB, "ram_assumed": False}
    return dataclasses.replace(device, **changes)


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
    """Of a square product. On a GPU it is large, as a small one ends before a fast GPU has got the next; but where a
    smaller one takes long already, that is enough: without units for its dtype the largest may take a minute."""
    for size in (768,) if device.type == "cpu" else (256, 512, 1024, 2048):
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b)
        _once(product, device, 1)  # the first one loads libraries
        if _once(product, device, 1) > PROBE_ENOUGH_SECONDS:
            break
    return 2 * size**3 / _seconds(product, device)


def _probe_bandwidth(device: torch.device) -> float:
    source = torch.zeros(2**24, device=device)  # 64 MiB: beyond the caches
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one ``run``. A GPU gets many at once: otherwise launching one and waiting for it would be measured, too."""
    times = 1 if device.type == "cpu" else PROBE_QUEUE
    _once(run, device, times)
    best, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        best = min(best, _once(run, device, times))
    return best


def _once(run: Callable[[], object], device: torch.device, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / times
