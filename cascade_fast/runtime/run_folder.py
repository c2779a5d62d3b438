"""Whether a folder holds a run, and in which state."""

import shlex
from pathlib import Path

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import LockHeld, acquire_lock, is_temporary, read_json

LOCK = "run.lock"


def check_run(folder: Path, *, results: bool = False) -> None:
    """Makes sure that ``folder`` holds a finished run or, unless ``results`` are needed too, a saved cascade.

    Raises:
        InputError: it holds something else, a run that is still training, or one that was interrupted.
    """
    if not folder.is_dir():
        raise InputError(f"RUN: {str(folder)!r}; {'is a file' if folder.exists() else 'no such folder'}")
    if (folder / "config.json").exists():
        config = read_json(folder / "config.json")
    elif (folder / LOCK).exists() and all(path.name == LOCK or is_temporary(path) for path in folder.iterdir()):
        config = {"machine": None}  # a run that has only just begun
    else:
        raise InputError(f"RUN: {str(folder)!r}; is not the folder of a run: it has no config.json")
    if not {"machine", "model_type"} & config.keys():
        raise InputError(f"RUN: {str(folder)!r}; its config.json is not that of a run or of a cascade")
    if "machine" not in config and results:
        raise InputError(f"RUN: {str(folder)!r}; holds a saved model: results are in the folder of its run")
    if "model_type" in config and (not results or (folder / "results.json").exists()):
        return
    if _in_use(folder / LOCK):
        raise InputError(f"RUN: {str(folder)!r}; is still training: no results yet")
    raise InputError(
        f"RUN: {str(folder)!r}; the run was interrupted: no results yet. The command that began it goes on with "
        f"--out {shlex.quote(str(folder))} --resume auto"
    )


def _in_use(lock: Path) -> bool:
    """Whether another process holds the lock; no where that cannot be found out, as in a read-only folder."""
    if not lock.exists():
        return False
    try:
        acquire_lock(lock, timeout=0).release()
    except LockHeld:
        return True
    except OSError:
        pass
    return False
