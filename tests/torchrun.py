"""Starts processes that train together: as people do, and in children of the server, which have imported everything."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from run_faults import FaultServer

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# Each thread more would add in another order; and this machine's own network will do.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def together(server: FaultServer, count: int, *argv: str | Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """``count`` processes, each with the environment that torchrun gives. What all say, in the order of their ranks.

    argv: a command's name or a script, and its arguments. more: of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [server.start(*argv, environment={**ENVIRONMENT, **where, **rank, **more}) for rank in ranks]
    try:
        answers = [process.answer() for process in started]
    finally:
        for process in started:
            process.kill()
    code = next((answer["code"] for answer in answers if answer["code"]), 0)
    out, err = ("".join(answer[name] for answer in answers) for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, code, out, err)
