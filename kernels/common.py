"""What kernels and launchers share: rounding, tile sizes, row strides, the launch device.

Shape legend: N rows (tokens), B independent selections, D hidden size, K selected rows.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE_BYTES = 4096  # of a [rows, columns] tile: two 16-byte accesses for each of 128 threads


def tile_shape(d: int, element_size: int) -> tuple[int, int]:
    """(rows, columns) of a tile over ``d`` columns: of 256, 128 and 64 the width that pads ``d`` least."""
    columns = min((256, 128, 64), key=lambda width: triton.cdiv(d, width) * width)
    return TILE_BYTES // element_size // columns, columns


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself when its last dimension is dense (any row stride), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_ints(x: Tensor) -> Tensor:
    """The same bytes as integers: a copy must not touch the bits (NaN payloads, bfloat16)."""
    return x.view(INT_OF_SIZE[x.element_size()])


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def check_index_on_cpu(index_K: Tensor, n: int) -> None:
    """An IndexError for an index outside ``[0, n)``; on a GPU nothing, as looking would wait for it."""
    if index_K.device.type == "cpu" and index_K.numel() and not ((index_K >= 0) & (index_K < n)).all():
        raise IndexError(f"index: out of range for {n} rows")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even; for bfloat16 in integers, as sm_75 has no instruction for it."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(dtype)
    return out
