"""Whether the disk has room for what a run will write, before it writes anything."""

import contextlib
from pathlib import Path

from cascade_fast.input_checks import InputError
from cascade_fast.planning.memory import BASE_PASS_DISK
from cascade_fast.runtime.files import free_disk_bytes


def check_disk(planned: dict[str, float], *, out: Path, base_pass: Path) -> None:
    """Compares the plan with what is free.

    Args:
        planned: bytes by what they are for; ``MemoryPlan.disk``.
        out: folder of the run; what is in it already counts as written.
        base_pass: where in the cache folder the base pass is, or will be; likewise.

    Raises:
        InputError: too little is free, where, and how much is needed for what.
    """
    needed: dict[int, float] = {}  # by file system
    places: dict[int, Path] = {}
    for folder, wanted in (
        (base_pass, planned[BASE_PASS_DISK]),
        (out, sum(planned.values()) - planned[BASE_PASS_DISK]),
    ):
        device = _existing(folder).stat().st_dev
        needed[device] = needed.get(device, 0.0) + max(0.0, wanted - _bytes_in(folder))
        places.setdefault(device, folder)
    for device, wanted in needed.items():
        free = free_disk_bytes(places[device])
        if wanted > free:
            rows = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in planned.items() if size)
            raise InputError(
                f"out, cache_dir: {str(out)!r}, {str(base_pass)!r}; the run needs {wanted / 2**20:,.1f} MiB more on "
                f"the disk of {str(places[device])!r}, where {free / 2**20:,.1f} MiB are free (MiB in all: {rows}). "
                "Make room, name another folder, or take less text"
            )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # just removed
            total += path.stat().st_size if path.is_file() else 0
    return total
