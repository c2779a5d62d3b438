"""What a run computes with: device and compute dtype, chosen by what the hardware does fast; and its memory."""

import contextlib
import ctypes
import functools
import gc
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.processes import processes


@dataclass(frozen=True)
class Compute:
    """Device, and the dtype of matrix products; ``reason`` says why that dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str = "asked for"

    @classmethod
    def choose(cls, device: str, dtype: str) -> "Compute":
        """Of the settings ``device`` and ``dtype``; ``auto`` is the best there is.

        On a GPU sums within float16 products stay in float32 from then on, in the whole process: scaled gradients may
        be close to float16's largest number, and their partial sums beyond it.

        Raises:
            InputError: a device that is not there.
        """
        found = choose_device(device)
        if found.type == "cuda":
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        return cls(found, *choose_dtype(found, dtype))

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def device_name(self) -> str:
        """As the vendor calls a GPU; ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in ``dtype``, the rest in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def memory_bytes(self) -> float:
        """Of the device."""
        if self.device.type == "cpu":
            return ram_bytes()
        return torch.cuda.get_device_properties(self.device).total_memory

    def peak_memory_bytes(self) -> int:
        """What a plan's peak is compared with: the most torch has held on the GPU, or this process's resident set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_rss_bytes()

    def reset_peak_memory(self) -> bool:
        """Gives freed memory back and makes :meth:`peak_memory_bytes` count from now on; False where the system lets
        nobody do that."""
        release_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        return reset_peak_rss()


def wait_for(device: torch.device) -> None:
    """Returns once ``device`` has done all it was given; for before a look at the clock, as a GPU's work is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``. From the host to a GPU it goes by pinned memory, and the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopies:
    """Tensors on their way to the host, which can do other things until it waits for them.

    From a GPU they go into pinned memory, as torch takes it for copies that nobody waits for.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        gpu = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
        self._arrived = None if gpu is None else torch.cuda.current_stream(gpu).record_event()

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors on the host, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def choose_device(asked: str) -> torch.device:
    """``asked``, or for ``auto`` a CUDA GPU when there is one. Raises InputError for a device that is not there."""
    these = processes()
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and these.several:
        asked = f"cuda:{these.local_rank}"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InputError(f"device: {asked!r}; must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {asked!r}; must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and these.several and device.index != these.local_rank:
        raise InputError(f"device: {asked!r}; with several processes each has its own GPU: leave out the number")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {asked!r}; this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


def choose_dtype(device: torch.device, asked: str) -> tuple[torch.dtype, str]:
    """The compute dtype and why.

    By compute capability on a GPU: ``torch.cuda.is_bf16_supported()`` is True on a T4, where bfloat16 is emulated
    and slow. On the CPU bfloat16 pays where AVX512-BF16 or AMX multiplies it.
    """
    if asked != "auto":
        if asked == "bfloat16" and device.type == "cuda":
            _warn_if_emulated(device)
        return getattr(torch, asked), "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has bfloat16 tensor cores"
        if major >= 7:
            return torch.float16, f"compute capability {major}.{minor} has float16 tensor cores and no bfloat16"
        return torch.float32, f"compute capability {major}.{minor} has no tensor cores"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has AMX"
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16, "this CPU has AVX512-BF16"
    return torch.float32, "this CPU has neither AVX512-BF16 nor AMX"


@functools.cache
def _warn_if_emulated(device: torch.device) -> None:
    """Warns once that bfloat16 is slow on ``device``, if it is."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            f"dtype: bfloat16 on a GPU of compute capability {major}.{minor} is emulated and slow (8.0 is the first to "
            f"have it); --dtype {'float16' if major >= 7 else 'float32'} is faster there",
            stacklevel=2,
        )


PADDED_TO = 32  # rows: see padded_rows


def padded_rows(x_ND: torch.Tensor) -> torch.Tensor:
    """``x`` with rows of zeros up to a multiple of ``PADDED_TO``, for products on the CPU.

    oneDNN compiles a kernel for every size of a 16-bit product, in 3 to 10 ms: as long as 20 such products take. Where
    every batch has another size, that would be most of the time.
    """
    return torch.nn.functional.pad(x_ND, (0, 0, 0, -x_ND.shape[0] % PADDED_TO))


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation of this process; whether it could be told.

    By default every array above 32 MB is fresh from the kernel each time, which hands it out in pages of 4 KB: filling
    50 MB of logits then takes 19 ms instead of 2. Peak memory stays; the memory comes back when the process ends (or
    with ``malloc_trim``).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


def release_memory() -> None:
    """Gives what has been freed back to the device and the system; for the seam between two phases of a run.

    glibc keeps freed blocks below 32 MiB for itself: after the base pass that would be most of the base.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_host_memory()


def trim_host_memory() -> None:
    """Gives the system back every page of the host's memory that holds nothing but freed blocks."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        ctypes.CDLL(None).malloc_trim(0)


# --- memory figures ---------------------------------------------------------------------------------------------------

CONTROL_GROUP = Path("/sys/fs/cgroup")  # this process's, as a container sees it; version 1 has a folder for memory


def ram_bytes() -> float:
    """Of this machine, or of the control group (container) this process is in."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        return math.inf
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            total = min(total, float((CONTROL_GROUP / limit).read_text()))
    return total


def free_ram_bytes() -> float:
    """What this machine, or the control group this process is in, still has room for; pages of files that the system
    can drop count as room."""
    free = ram_bytes() - resident_bytes()  # all that some systems tell
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder, limit, used, prefix in (
        (CONTROL_GROUP, "memory.max", "memory.current", ""),
        (CONTROL_GROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = float((folder / limit).read_text()) - float((folder / used).read_text())
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            droppable = sum(float(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            free = min(free, left + droppable)
    return free


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell.

    On Linux not ``ru_maxrss``: that is also the largest of whoever started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            (int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:")), 0
        )
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Makes :func:`peak_rss_bytes` count from now on; False where that cannot be done: on anything but Linux (4.0 or
    later), and in some containers."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True
