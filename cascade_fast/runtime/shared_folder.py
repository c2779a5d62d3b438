"""Whether the processes of a run see the same files."""

import secrets
import time
from pathlib import Path

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import atomic_write_text
from cascade_fast.runtime.processes import processes

SECONDS = 10.0  # after which a file that another machine has written must be seen


def check_shared(folder: Path, setting: str, move: str) -> None:
    """Checks that all processes of the run see one ``folder``; called by all of them. One alone checks nothing.

    Args:
        folder: is made if it is not there.
        setting: the one that names it, for the message.
        move: what names another folder, for the message.

    Raises:
        InputError: in all of them, if one does not see what the first one has written.
    """
    these = processes()
    if not these.several:
        return
    token = these.of_first(secrets.token_hex(8))
    path = folder / f".tmp{token[:6]}"  # as a temporary file, should it stay
    if these.first:
        atomic_write_text(path, token)
    these.wait()
    unseen = these.largest([0 if _seen(path) else these.rank + 1])[0]
    if these.first:
        path.unlink(missing_ok=True)
    if unseen:
        raise InputError(
            f"{setting}: {str(folder)!r}; must be on a file system that all processes of the run see, and process "
            f"{unseen - 1} does not see there what process 0 has written: name another folder with {move}"
        )


def _seen(path: Path) -> bool:
    end = time.monotonic() + SECONDS
    while not path.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
