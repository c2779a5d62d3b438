"""Files that are whole or noticed: written atomically, with a checksum inside that every reader checks.

A JSON file has the SHA-256 of its content under ``sha256``, a safetensors file in its metadata. Whoever changes such a
file by hand removes ``sha256``: a file without one is read unchecked. Nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade_fast.input_checks import InputError, one_line

CHECKSUM = "sha256"
METADATA = "cascade_fast"  # of a safetensors file: JSON with its checksum
RecordRead = TypeVar("RecordRead")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# What a killed process leaves: temporary files of atomic_write, and those that safetensors itself writes first.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp|\.tmp\w{6}")
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it


class DamagedFile(InputError):
    """A file that is missing, cannot be read, or does not match its checksum."""


class DiskFull(InputError):
    """No room for a file; the message says how much is needed, how much is free, and where."""

    def __init__(self, path: Path, needed: float | None) -> None:
        more = "" if needed is None else f" needs {needed / 2**20:,.1f} MiB,"
        free = f"{free_disk_bytes(path) / 2**20:,.1f} MiB are free there"
        super().__init__(
            f"the disk is full: {str(path)!r}{more} {free}; make room and give the same command again (a "
            "training's with --resume auto)"
        )


def free_disk_bytes(path: Path) -> float:
    """Free where ``path`` is, or will be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return float(shutil.disk_usage(there).free)


@contextlib.contextmanager
def room_for(path: Path, needed: float | None = None) -> Iterator[None]:
    """Raises DiskFull where the work within finds the disk full. ``needed``: bytes, for the message."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise DiskFull(path, needed) from error
    except SafetensorError as error:  # has the system's number in its text alone
        if not any(f"os error {number})" in str(error) for number in _DISK_FULL):
            raise
        raise DiskFull(path, needed) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, write: Callable[[Path], object], *, size: float | None = None) -> None:
    """``write`` fills a temporary file beside ``path``, which then takes its place, flushed to disk first.

    Raises:
        DiskFull: what was there before is still there. ``size``: bytes needed, for the message.
    """
    with room_for(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            set_mode(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def set_mode(path: Path) -> None:
    """As any other new file's: safetensors' are for their owner alone."""
    path.chmod(0o666 & ~_UMASK)


def atomic_write_text(path: Path, text: str) -> None:
    content = text.encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(content), size=len(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with a checksum, atomically; NaN and infinity are refused, as other tools' readers do."""
    text = json.dumps({**content, CHECKSUM: json_checksum(content)}, indent=2, allow_nan=False)
    atomic_write_text(path, text + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any] | None = None) -> None:
    """A safetensors file with a checksum, atomically; ``state`` goes into its metadata as JSON. Tensors are brought to
    the CPU and made contiguous."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(state or {}, sort_keys=True)
    # One entry: safetensors writes several in an order that changes, and the same tensors shall be the same bytes.
    metadata = {METADATA: json.dumps({"state": text, CHECKSUM: _tensors_checksum(plain, text)}, sort_keys=True)}
    size = sum(t.numel() * t.element_size() for t in plain.values())
    atomic_write(path, lambda temporary: save_file(plain, temporary, metadata=metadata), size=size)


def allocate(path: Path, size: int) -> None:
    """A file of ``size`` bytes that the disk has room for: writing to it through a mapping cannot fail any more, where
    on a full disk it would end the process (SIGBUS). Raises OSError where there is no room."""
    with path.open("wb") as file:
        if size and not _reserved(file.fileno(), size):
            zeros = bytes(2**20)
            for start in range(0, size, len(zeros)):
                file.write(zeros[: size - start])


def _reserved(descriptor: int, size: int) -> bool:
    """Whether the system could reserve the bytes without writing them."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS, Windows
        return False
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        return False
    return True


# --- reading ----------------------------------------------------------------------------------------------------------


def read_json(path: Path, *, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a JSON file with the keys ``needs``, without its checksum.

    Raises:
        DamagedFile: not there, no JSON object, a key is missing, or the checksum differs.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFile(f"{str(path)!r} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{str(path)!r} is damaged: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{str(path)!r} is damaged: holds {type(content).__name__}, not an object")
    check_json(path, content)
    for name in needs:
        if name not in content:
            raise DamagedFile(f"{str(path)!r} is damaged: has no {name}")
    return content


def load_record(path: Path, from_dict: Callable[[dict[str, Any]], RecordRead]) -> RecordRead:
    """What ``from_dict``, of a class of :mod:`cascade_fast.records`, makes of the content of a JSON file.

    Raises:
        DamagedFile: as :func:`read_json`, or the content is not that of such a record.
    """
    try:
        return from_dict(read_json(path))
    except DamagedFile:
        raise
    except InputError as error:
        raise DamagedFile(f"{str(path)!r} is damaged: {error}") from error


def check_json(path: Path | str, content: dict[str, Any]) -> None:
    """Takes the checksum out of ``content``, the whole of ``path``. Raises DamagedFile if it differs."""
    checksum = content.pop(CHECKSUM, None)
    if checksum is not None and checksum != json_checksum(content):
        raise DamagedFile(f"{str(path)!r} is damaged, or was changed: its {CHECKSUM} differs")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, mapped from the file, and state, of what :func:`save_tensors` has written (or of any safetensors file).

    Raises:
        DamagedFile: not there, no safetensors file, or the checksum differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = metadata.get("state", "{}")
        if CHECKSUM in metadata and metadata[CHECKSUM] != _tensors_checksum(tensors, text):
            raise ValueError("its checksum differs")
        return tensors, json.loads(text)
    except FileNotFoundError:
        raise DamagedFile(f"{str(path)!r} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(f"{str(path)!r} is damaged: {one_line(error)}") from error


# --- checksums --------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def json_checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content, however it is written."""
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, as a buffer."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def _tensors_checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(tensor_bytes(t))
    return digest.hexdigest()


# --- folders ----------------------------------------------------------------------------------------------------------


def check_new_folder(where: str, path: Path) -> None:
    """Raises InputError where ``path`` is something else than nothing or an empty folder. ``where`` begins the
    message."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"{where}; {str(there)!r} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{where}; exists and is not empty: name another folder, or remove it first")


@contextlib.contextmanager
def new_folder(path: Path, *, size: float | None = None) -> Iterator[Path]:
    """A folder that is there whole or not at all: the work within fills a temporary one beside ``path``, which then
    takes its place, flushed to disk first.

    Raises:
        DiskFull: there is nothing at ``path`` then. ``size``: bytes needed, for the message.
    """
    path = path.resolve()  # a link to an empty folder stays a link
    with room_for(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process of that number that was killed
        try:
            temporary.mkdir()
            yield temporary
            for file in (p for p in temporary.rglob("*") if p.is_file()):
                set_mode(file)
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            if path.is_dir():
                path.rmdir()  # fails where it is not empty any more
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Whether a process that was killed may have left this behind while it wrote."""
    return _TEMPORARY.fullmatch(path.name) is not None


def clear_temporaries(folder: Path) -> None:
    """Removes what killed processes left, in the whole folder; nobody else may be writing in it."""
    for path in folder.rglob(".*"):
        if is_temporary(path) and path.is_file():
            path.unlink(missing_ok=True)


class LockHeld(Exception):
    """Somebody else holds a lock. ``hint``: what to do where the file itself is the lock and its owner may be gone."""

    def __init__(self, path: Path, hint: str) -> None:
        super().__init__(f"{str(path)!r} is held{hint}")
        self.hint = hint


def acquire_lock(path: Path, *, timeout: float = -1) -> filelock.BaseFileLock:
    """The lock of file ``path``, held until released or the process ends. On a file system without ``flock`` the file
    itself is the lock, and stays when a process is killed.

    Args:
        timeout: seconds to wait; -1: as long as it takes.

    Raises:
        LockHeld: somebody else holds it.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: filelock.BaseFileLock = filelock.FileLock(path)
    there = path.exists()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # filelock's, that it does without flock
            try:
                lock.acquire(timeout=timeout)
            except (NotImplementedError, OSError) as error:
                if isinstance(error, filelock.Timeout) or getattr(error, "errno", errno.ENOSYS) not in _NO_FLOCK:
                    raise
                if not there:
                    path.unlink(missing_ok=True)  # made by the attempt
                lock = filelock.SoftFileLock(path)
                lock.acquire(timeout=timeout)
    except filelock.Timeout:
        hint = ""
        if isinstance(lock, filelock.SoftFileLock):
            owner = " ".join(path.read_text(encoding="utf-8", errors="replace").split())[:200] if path.exists() else ""
            hint = f" ({owner or 'by whom is not known'}); if that process is gone, remove {str(path)!r}"
        raise LockHeld(path, hint) from None
    return lock


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Holds :func:`acquire_lock`'s lock for the work within."""
    lock = acquire_lock(path, timeout=timeout)
    try:
        yield
    finally:
        lock.release()
