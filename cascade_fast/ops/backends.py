"""Who serves which operator on which device.

A *backend* is a name: ``reference`` (plain torch, any device), ``cpp`` (the compiled extension, CPU),
``cuda`` (the compiled extension, NVIDIA GPUs) or ``triton`` (NVIDIA GPUs; CPU tensors too when Triton's
interpreter is on). ``auto`` takes the best one that can run: ``cpp`` on the CPU; on a GPU ``triton`` from
compute capability 8.0 on and ``cuda`` below it (upstream Triton does not support sm_75, where it comes second, for
extensions without a CUDA part). The environment variable ``CASCADE_FAST_BACKEND`` replaces ``auto``. A backend asked
for by name that cannot run is an error.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from cascade_fast.ops import reference

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
SELECTION_OPS = ("cosine_score", "select_hard", "gather_rows", "scatter_rows")
OTHER_OPS = (
    "cross_entropy_",
    "rms_norm",
    "rms_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "scale_into_",
    "silu_mul",
    "silu_mul_backward",
    "rotate_rows",
    "rotate_rows_backward",
    "attention",
    "attention_backward",
    "low_rank",
    "low_rank_backward",
    "adamw8bit",
)
GPU_OPS = ("grad_norm", "adamw_")  # on the CPU torch's own bodies do as well
OPS = SELECTION_OPS + OTHER_OPS + GPU_OPS
LAYER_OPS = (
    "rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward", "silu_mul", "silu_mul_backward",
    "rotate_rows", "rotate_rows_backward",
)  # fmt: skip
# Around attention on a GPU. The CPU has other operators there.
HEAD_OPS = ("place_heads", "place_heads_backward", "take_heads", "take_heads_backward")
# Those with kernels for GPUs. Plain torch serves the others there: nothing is missing.
CUDA_OPS = (*SELECTION_OPS, *LAYER_OPS, *HEAD_OPS, *GPU_OPS, "cross_entropy_", "adamw8bit")
TRITON_OPS = (*SELECTION_OPS, *LAYER_OPS, "cross_entropy_")

if importlib.util.find_spec("cascade_fast._C") is not None:
    # An extension that is there but fails to import is an error: a broken .so is not a missing one.
    import cascade_fast._C  # noqa: F401


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _native_op(op: str, dispatch_key: str) -> Callable | None:
    """The extension's body of ``op``, or None when the extension was built without it."""
    name = f"cascade_fast_native::{op}"
    try:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)
    except RuntimeError:  # no operator of that name: the extension is not there
        registered = False
    return getattr(torch.ops.cascade_fast_native, op).default if registered else None


@functools.cache
def _triton_launchers() -> dict[str, Callable] | None:
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("cascade_kernels") is None:
        return None
    from cascade_kernels import launchers

    return launchers.LAUNCHERS


@functools.cache
def _triton_cannot_start() -> str | None:
    """Why Triton starts no kernel on this machine's GPU, if so: its driver is compiled when it is first used, which
    takes a C compiler and libcuda."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of any kind: a compiler's, the linker's, an assertion
        return f"Triton cannot use the GPU: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def why_not(op: str, device: torch.device, backend: str) -> str | None:
    """The reason why ``backend`` cannot serve ``op`` on ``device``; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device.type != "cpu":
            return f"it serves CPU tensors, these are on {device}"
        if op in GPU_OPS:
            return "torch's own operators do as well on the CPU"
        return None if _native_op(op, "CPU") else "the compiled extension cascade_fast._C is not installed"
    if backend == "cuda":
        if device.type != "cuda":
            return f"it serves CUDA tensors, these are on {device}"
        return None if _native_op(op, "CUDA") else "the compiled extension has no CUDA part"
    if device.type != "cuda" and not _triton_interpreted():
        return f"it serves CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs it on the CPU)"
    launchers = _triton_launchers()
    if launchers is None:
        return "triton or cascade_kernels is not installed"
    if op not in launchers:
        return f"cascade_kernels has no launcher for {op}"
    return _triton_cannot_start() if device.type == "cuda" and not _triton_interpreted() else None


def _preference(op: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("reference",) if op in (*HEAD_OPS, *GPU_OPS) else ("cpp", "reference")
    if device.type != "cuda":
        return ("reference",)
    capability = _capability(device.index or 0)
    cuda, triton = ("cuda",) * (op in CUDA_OPS), ("triton",) * (op in TRITON_OPS and capability >= (7, 5))
    return (*triton, *cuda, "reference") if capability >= (8, 0) else (*cuda, *triton, "reference")


@functools.cache
def _warn_once(device_type: str, wanted: str, taken: str, reason: str) -> None:
    warnings.warn(f"cascade_fast: {device_type} operators run on {taken}, not {wanted}: {reason}", stacklevel=2)


def choose(op: str, device: torch.device, backend: str = "auto") -> str:
    """The backend that serves ``op`` on ``device``.

    Raises:
        ValueError: ``backend`` (or ``CASCADE_FAST_BACKEND``) is not one of ``BACKENDS``.
        RuntimeError: the backend asked for by name cannot run there; the message says why.
    """
    source = "backend"
    if backend == "auto":
        source = "CASCADE_FAST_BACKEND"
        backend = os.environ.get(source) or "auto"
        if op in GPU_OPS and backend in ("cpp", "triton"):  # which have none of them: no reason to stop a run
            backend = "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend != "auto":
        reason = why_not(op, device, backend)
        if reason is not None:
            raise RuntimeError(f"{source}={backend!r} cannot run {op}: {reason}")
        return backend
    wanted = _preference(op, device)
    reasons = [why_not(op, device, name) for name in wanted]
    taken = reasons.index(None)  # the reference, last in every preference, runs everywhere
    if taken > 0:
        _warn_once(device.type, wanted[0], wanted[taken], str(reasons[0]))
    return wanted[taken]


def fused(op: str, device: torch.device) -> bool:
    """Whether ``op`` is worth its call in training: on a GPU that nobody but ``reference`` serves, and where
    torch.compile makes kernels of its own, torch's own operators do as well."""
    return device.type == "cpu" or (not torch.compiler.is_compiling() and choose(op, device) != "reference")


def body(op: str, device: torch.device, backend: str) -> Callable:
    """The function that computes ``op`` on ``device``; same arguments and results for every backend."""
    name = choose(op, device, backend)
    if name == "reference":
        return getattr(reference, op)
    if name == "triton":
        launchers = _triton_launchers()
        assert launchers is not None
        return launchers[op]
    native = _native_op(op, "CPU" if name == "cpp" else "CUDA")
    assert native is not None
    return native
