"""Device and compute dtype, chosen by what the hardware does fast, with the reason in words."""

import contextlib
import ctypes
import gc
import sys

import torch

from cascade_fast.config import ConfigError
from cascade_fast.metrics import peak_rss_bytes


def choose_device(asked: str) -> torch.device:
    """``asked``, or for ``auto`` a CUDA GPU when there is one. Raises ConfigError for a device that is not there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"device: {asked!r}; must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {asked!r}; must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {asked!r}; this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


def choose_dtype(device: torch.device, asked: str) -> tuple[torch.dtype, str]:
    """The compute dtype and why.

    By compute capability on a GPU: ``torch.cuda.is_bf16_supported()`` is True on a T4, where bfloat16 is emulated
    and slow. On the CPU bfloat16 pays where AVX512-BF16 or AMX multiplies it.
    """
    if asked != "auto":
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


def peak_memory_bytes(device: torch.device) -> int:
    """What the plan's peak is compared with: the most torch has held on the GPU, or this process's resident set."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


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
