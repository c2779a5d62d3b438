"""What the tests of CUDA kernels share: where the sources are, when they can be emulated, and a card.

The emulated tests compile kernel headers alone to PTX for sm_75 and execute that in ``ptxsim``, a PTX emulator that
also reports data races, accesses out of bounds and reads of memory nobody wrote. They skip where it or nvcc is missing.
"""

import importlib.util
import shutil
from collections.abc import Sequence
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
emulated = pytest.mark.skipif(
    not has_nvcc or importlib.util.find_spec("ptxsim") is None,
    reason="needs nvcc and the PTX emulator ptxsim on PYTHONPATH",
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
