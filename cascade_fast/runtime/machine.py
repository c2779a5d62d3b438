"""What a run was made with: versions of packages, and the machine."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cascade_fast import __version__
from cascade_fast.runtime.compute import Compute

PACKAGES = ("torch", "transformers", "datasets", "safetensors")


def package_versions() -> dict[str, str]:
    return {"cascade_fast": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def describe_machine(compute: Compute) -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": compute.device_name,
        "dtype": compute.dtype_name,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
