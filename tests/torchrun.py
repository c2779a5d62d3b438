"""Starts processes that train together, as people do."""

import os
import subprocess
import sys

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# Each thread more would add in another order; and this machine's own network will do.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def torchrun(count: int, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """``more``: of the environment."""
    command = [*TORCHRUN, str(count), *arguments]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
