"""What the tests of CUDA kernels share: where the sources are, when they can be emulated, and a card.

The emulated tests compile kernel headers alone to PTX for sm_75 and execute that in ``ptxsim``, a PTX emulator that
also reports data races, accesses out of bounds and reads of memory nobody wrote. They skip where it or nvcc is missing.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade_fast import ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc" / "cuda"
DTYPES = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
WORDS = {16: "uint4", 4: "uint32_t", 2: "uint16_t"}

has_nvcc = shutil.which("nvcc") is not None


def _emulated(missing: bool, needs: str) -> Callable[[Any], Any]:
    """Marks a test, or a class of them, as one of ``make test-emulated``; skipped where what it needs is missing."""
    skipped = pytest.mark.skipif(missing, reason=f"needs {needs}")
    return lambda test: pytest.mark.emulated(skipped(test))


emulated = _emulated(
    not has_nvcc or importlib.util.find_spec("ptxsim") is None, "nvcc and the PTX emulator ptxsim on PYTHONPATH"
)
needs_nvcc = pytest.mark.skipif(not has_nvcc, reason="needs nvcc")


def compile_headers(headers: Sequence[str], instances: Sequence[str]) -> Any:
    """The module of ``ptxsim`` with the kernels of ``csrc/cuda/<header>.cuh`` and their template ``instances``."""
    from ptxsim.cuda import compile_source

    lines = [*(f'#include "{name}.cuh"' for name in headers), "namespace cascade {", *instances, "}"]
    return compile_source("\n".join(lines), arch="compute_75", include=[str(CSRC)])


def mangled(dtype: torch.dtype) -> str:
    """The element type as the names of kernels have it."""
    return f"NS_{len(DTYPES[dtype])}{DTYPES[dtype]}E"


def wide(*matrices: Tensor) -> bool:
    """Whether all rows start on 16 bytes, as rows_aligned in launch.cuh decides it."""
    return all(
        (m.storage_offset() * m.element_size()) % 16 == 0 and (m.stride(0) * m.element_size()) % 16 == 0
        for m in matrices
    )


def moved(*stats: Any) -> int:
    """Bytes of all 32-byte sectors that the kernels asked for, as if there were no cache."""
    return sum(s.moved_bytes for s in stats)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cuda_card(op: str) -> torch.device:
    """The card, for tests marked gpu; fails where the extension has no CUDA body of ``op``: it must not look green."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = ops.why_not(op, device, "cuda")
    assert reason is None, reason
    return device


GRAPH_OR_NOT = pytest.mark.parametrize("how", ["compile", "graph", "side-stream"])


def stepped(how: str, step: Callable[..., Any], *args: Any) -> Any:
    """What ``step`` gives compiled, from a captured graph, or on another stream. Capturing it also proves that nothing
    in it waits for the device."""
    if how == "compile":
        got = torch.compile(step, fullgraph=True)(*args)
    elif how == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step(*args)
        for _ in range(3):
            graph.replay()
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = step(*args)
    torch.cuda.synchronize()
    return got


def _in_a_process(command: Sequence[str], **environment: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


def run_interpreted(tests: Sequence[str]) -> str:
    """What pytest says, test by test, of ``tests`` in a process with Triton's interpreter; none fails."""
    places = [str(Path(__file__).with_name(name)) for name in tests]
    command = ["-m", "pytest", "-v", "--noconftest", "-p", "no:cacheprovider", *places]
    return _in_a_process(command, TRITON_INTERPRET="1")


needs_pretend_gpu = _emulated(importlib.util.find_spec("pretend_gpu") is None, "the package pretend_gpu on PYTHONPATH")


def on_pretend_card(program: str) -> Any:
    """What ``program``, which installs a pretend card, prints last, as JSON; in a process of its own."""
    return json.loads(_in_a_process(["-c", program]).splitlines()[-1])
