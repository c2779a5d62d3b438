"""Atomic, checksummed files: a reader sees the old content or the new, never a half; nothing is pickled.

A checkpoint is ``<name>-<step>.safetensors`` with its tensors and, in the file's metadata, a JSON state and the
SHA-256 of everything else. The last two are kept: a damaged newest one is noticed and the one before it is used.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEEP = 2


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` fills a temporary file beside ``path``, which then takes its place, flushed to disk first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, atomically; NaN and infinity are refused, as other tools' readers do."""
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, atomically. Tensors are brought to the CPU and made contiguous."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    atomic_write(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})}))


class Checkpoints:
    """The checkpoints of one thing being trained, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes the checkpoint of ``step`` and removes all but the last two."""
        payload = json.dumps(state, sort_keys=True)
        metadata = {"state": payload, "sha256": _checksum(tensors, payload)}
        save_tensors(self.folder / f"checkpoint-{step:09d}.safetensors", tensors, metadata)
        for old in self._paths()[:-KEEP]:
            old.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None; damaged ones are named in a warning and passed over."""
        for path in reversed(self._paths()):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                if _checksum(tensors, metadata["state"]) != metadata["sha256"]:
                    raise ValueError("checksum differs")
                return tensors, json.loads(metadata["state"])
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                warnings.warn(f"{path.name} is damaged ({error}); going back to the checkpoint before it", stacklevel=2)
        return None


def _checksum(tensors: dict[str, Tensor], payload: str) -> str:
    digest = hashlib.sha256(payload.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        if t.numel():
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
