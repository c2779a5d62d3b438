"""What is settled before a run writes anything: how it gets keys and values, and whether the disk has room for it."""

import contextlib
import dataclasses
from pathlib import Path

from cascade_fast.base.base_pass import pass_folder
from cascade_fast.base.model import BaseModel, cache_folder
from cascade_fast.base.texts import TokenBlocks
from cascade_fast.input_checks import InputError
from cascade_fast.planning.memory import BASE_PASS_DISK
from cascade_fast.planning.roofline import plan_on, this_machine, with_kv
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.files import free_disk_bytes
from cascade_fast.settings import RunSettings
from cascade_fast.stages.kind import base_needs


def settle_kv(
    settings: RunSettings,
    base: BaseModel,
    blocks: TokenBlocks,
    compute: Compute,
    why: list[str],
    out: Path,
    before: str | None,
) -> str:
    """``kv`` for this run: settled once, so that a run resumed on a fuller disk goes on as it began. ``why`` gets the
    line that says so.

    Raises:
        InputError: the disk has no room for what the run will write.
    """
    cache = cache_folder(settings)
    if before is not None:
        settings = dataclasses.replace(settings, kv=before)
    machine, dtype = this_machine(compute), compute.dtype
    settings, lines = with_kv(settings, base.config, machine, dtype, free_disk_bytes(cache))
    why += [f"plan: {line}" for line in lines]
    passed = pass_folder(base, blocks, settings, base_needs(settings), compute, cache)
    check_disk(plan_on(settings, base.config, machine, dtype).disk, out=out, base_pass=passed)
    return settings.kv


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
                "Make room, name another folder, or take fewer blocks"
            )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # just removed
            total += path.stat().st_size if path.is_file() else 0
    return total
