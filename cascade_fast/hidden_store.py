"""Hidden states of tokens on disk, memory-mapped: what the base pass leaves and a stage reads.

A store is a folder: ``index.json`` and one raw little-endian file for each array, every array with one row a token.

=============  ===============  =======================================================================
array          shape, dtype     meaning
=============  ===============  =======================================================================
``hidden``     (N, D) 16 or 32  the stage's input: residual stream or last hidden state of what came before
``kv``         as ``hidden``    (N, L, 2, G, E): keys, with their rotary positions, and values of L layers, G heads
                                of size E (only for a second look)
``label``      (N,) int64       the next token
``sequence``   (N,) int32       the block the token came from
``position``   (N,) int32       its place in that block
``score``      (N,) float32     difficulty; low is hard
``loss``       (N,) float32     cross-entropy at the exit the token has reached (absent where nobody asks)
=============  ===============  =======================================================================

A store is *finished* once its ``index.json`` has checksums; until then it may be written and its writing resumed.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.checkpoint import atomic_write_text, file_sha256

FORMAT = 1
_TOKEN_ARRAYS = {
    "label": torch.int64,
    "sequence": torch.int32,
    "position": torch.int32,
    "score": torch.float32,
    "loss": torch.float32,
}


class StoreError(RuntimeError):
    """A store that is missing, unfinished or damaged."""


class HiddenStore:
    """The arrays of one split. Use :meth:`create` or :meth:`open`."""

    def __init__(self, folder: Path, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.folder = folder
        self.arrays = arrays
        self.meta = meta

    def __len__(self) -> int:
        return self.arrays["label"].shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def hidden(self) -> Tensor:
        return self.arrays["hidden"]

    def part(self, rows: slice) -> "HiddenStore":
        """Those rows, as views: nothing is copied."""
        return HiddenStore(self.folder, {name: array[rows] for name, array in self.arrays.items()}, self.meta)

    def bytes(self) -> int:
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    @classmethod
    def create(
        cls,
        folder: Path,
        tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        with_loss: bool,
        meta: Mapping[str, Any],
        kv_shape: Sequence[int] | None = None,
    ) -> "HiddenStore":
        """A new writable store of ``tokens`` rows; what was in ``folder`` is removed. ``kv_shape``: (L, 2, G, E)."""
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        names = [name for name in _TOKEN_ARRAYS if with_loss or name != "loss"]
        layout = {"hidden": {"dtype": _name(dtype), "shape": [tokens, hidden_size]}}
        if kv_shape is not None:
            layout["kv"] = {"dtype": _name(dtype), "shape": [tokens, *kv_shape]}
        layout |= {name: {"dtype": _name(_TOKEN_ARRAYS[name]), "shape": [tokens]} for name in names}
        arrays = {name: _map(folder / f"{name}.bin", spec, writable=True) for name, spec in layout.items()}
        store = cls(folder, arrays, dict(meta))
        store._write_index(layout, checksums=None)
        return store

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None = None, writable: bool = False) -> "HiddenStore":
        """A finished store, read-only and checked; or, if ``writable``, one that is still being written.

        Raises:
            StoreError: no store there, another fingerprint, unfinished, or a file that does not match its checksum.
        """
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder}: no hidden store: {error}") from None
        if index.get("format") != FORMAT:
            raise StoreError(f"{folder}: format {index.get('format')}; this version reads {FORMAT}")
        if fingerprint is not None and index["meta"].get("fingerprint") != fingerprint:
            raise StoreError(f"{folder}: holds the hidden states of something else")
        checksums = index["checksums"]
        if (checksums is None) != writable:
            raise StoreError(f"{folder}: {'already finished' if writable else 'not finished'}")
        arrays = {}
        for name, spec in index["arrays"].items():
            path = folder / f"{name}.bin"
            if not path.is_file() or path.stat().st_size != _bytes(spec):
                raise StoreError(f"{path}: missing or of another size")
            if checksums is not None and file_sha256(path) != checksums[name]:
                raise StoreError(f"{path}: damaged (checksum differs)")
            arrays[name] = _map(path, spec, writable=writable)
        return cls(folder, arrays, index["meta"])

    def finish(self) -> "HiddenStore":
        """Writes the checksums: from here on the store is complete. Returns it opened read-only."""
        layout = {n: {"dtype": _name(a.dtype), "shape": list(a.shape)} for n, a in self.arrays.items()}
        self._write_index(layout, checksums={name: _tensor_sha256(a) for name, a in self.arrays.items()})
        return HiddenStore(
            self.folder, {n: _map(self.folder / f"{n}.bin", layout[n], writable=False) for n in layout}, self.meta
        )

    def _write_index(self, layout: dict[str, Any], checksums: dict[str, str] | None) -> None:
        index = {"format": FORMAT, "meta": self.meta, "arrays": layout, "checksums": checksums}
        atomic_write_text(self.folder / "index.json", json.dumps(index, indent=1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(spec: dict[str, Any]) -> int:
    size = getattr(torch, spec["dtype"]).itemsize
    for n in spec["shape"]:
        size *= n
    return size


def _map(path: Path, spec: dict[str, Any], *, writable: bool) -> Tensor:
    dtype, size = getattr(torch, spec["dtype"]), _bytes(spec)
    if size == 0:  # an empty file cannot be mapped
        path.touch()
        return torch.empty(spec["shape"], dtype=dtype)
    # shared=False maps copy-on-write: a stray write cannot reach the file.
    flat = torch.from_file(str(path), shared=writable, size=size // dtype.itemsize, dtype=dtype)
    return flat.view(spec["shape"])


def _tensor_sha256(array: Tensor) -> str:
    """Of the bytes as mapped: what a reader of the file sees, without waiting for the disk."""
    flat = array.reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
