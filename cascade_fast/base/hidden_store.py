"""Hidden states of tokens on disk, memory-mapped: what the base pass leaves and a stage reads.

A store is a folder: ``index.json`` and one raw little-endian file for each array, every array with one row a token.

=============  ===============  =======================================================================
array          shape, dtype     meaning
=============  ===============  =======================================================================
``hidden``     (N, D) 16 or 32  the stage's input: residual stream or last hidden state of what came before
``kv``         as ``hidden``    (N, L, 2, G, E): keys, with their rotary positions, and values of L layers, G heads
                                of size E (only for a second look)
``label``      (N,) int64       the next token; -100 where it is only read (context)
``sequence``   (N,) int32       the sequence the token came from; ascending
``position``   (N,) int32       its place in that sequence
``score``      (N,) float32     difficulty; low is hard; NaN without a label
``loss``       (N,) float32     cross-entropy at the exit the token has reached (absent where nobody asks); NaN as above
=============  ===============  =======================================================================

A store is written from its first row to its last (:meth:`HiddenStore.append`) and *finished* once its ``index.json``
has checksums. Until then ``progress.json`` tells how many rows are done, with their checksums, so that writing can go
on after the process has died.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_fast.base.sequences import NO_LABEL
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.runtime.files import (
    DamagedFile,
    DiskFull,
    allocate,
    file_sha256,
    read_json,
    room_for,
    tensor_bytes,
    write_json,
)
from cascade_fast.runtime.transfer import upload

FORMAT = 2
WIDE = ("hidden", "kv")  # arrays that may lie on a GPU
INDEX, PROGRESS = "index.json", "progress.json"
_TOKEN_ARRAYS = {
    "label": torch.int64,
    "sequence": torch.int32,
    "position": torch.int32,
    "score": torch.float32,
    "loss": torch.float32,
}


class StoreError(InputError):
    """A store that is missing, unfinished or damaged."""


class HiddenStore:
    """The arrays of one split. Use :meth:`create` or :meth:`open`."""

    def __init__(self, folder: Path, arrays: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.folder = folder
        self.arrays = arrays
        self.meta = meta
        self.rows = 0  # written so far, of a store that is being written
        self._digests = {name: hashlib.sha256() for name in arrays}

    def __len__(self) -> int:
        return self.arrays["label"].shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def hidden(self) -> Tensor:
        return self.arrays["hidden"]

    @property
    def device(self) -> torch.device:
        """Where the wide arrays are, ``hidden`` and ``kv``. The others, a number a token, are always the host's."""
        return self.hidden.device

    def to(self, device: torch.device) -> "HiddenStore":
        """The same with a copy of the wide arrays on ``device``; on the CPU the store itself, mapped as it is."""
        if device.type == self.device.type:
            return self
        wide = {name: upload(self[name], device) for name in WIDE if name in self}
        return HiddenStore(self.folder, {**self.arrays, **wide}, self.meta)

    @property
    def handed_on_dtype(self) -> torch.dtype:
        """How hidden states travel from stage to stage: bfloat16 if they came so, else float32 (float16 might
        overflow)."""
        return torch.bfloat16 if self.hidden.dtype == torch.bfloat16 else torch.float32

    def labelled_index(self) -> Tensor:
        """Rows of the tokens with a label, (J,) int64, ascending. No other is ever selected or measured."""
        return (self["label"] != NO_LABEL).nonzero().squeeze(1)

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
        layout = {"hidden": {"dtype": dtype_name(dtype), "shape": [tokens, hidden_size]}}
        if kv_shape is not None:
            layout["kv"] = {"dtype": dtype_name(dtype), "shape": [tokens, *kv_shape]}
        layout |= {name: {"dtype": dtype_name(_TOKEN_ARRAYS[name]), "shape": [tokens]} for name in names}
        try:
            with room_for(folder, sum(spec_bytes(spec) for spec in layout.values())):
                for name, spec in layout.items():
                    allocate(folder / f"{name}.bin", spec_bytes(spec))
        except DiskFull:
            shutil.rmtree(folder)  # what could be allocated is of no use
            raise
        arrays = {name: _map(folder / f"{name}.bin", spec, writable=True) for name, spec in layout.items()}
        store = cls(folder, arrays, dict(meta))
        store._write_index(layout, checksums=None)
        return store

    @classmethod
    def open(cls, folder: Path, *, fingerprint: str | None = None, check: bool = True) -> "HiddenStore":
        """A finished store, read-only and checked.

        Args:
            check: read every file and compare its checksum; another process may have done so just now.

        Raises:
            StoreError: no store there, another fingerprint, unfinished, or a file that does not match its checksum.
        """
        index, arrays = cls._open(folder, fingerprint, writable=False)
        for name, checksum in index["checksums"].items() if check else ():
            if file_sha256(folder / f"{name}.bin") != checksum:
                raise StoreError(f"{folder / f'{name}.bin'}: damaged (checksum differs)")
        return cls(folder, arrays, index["meta"])

    @classmethod
    def resume(cls, folder: Path, *, fingerprint: str) -> "HiddenStore":
        """A store that is still being written, as far as its progress was saved.

        Raises:
            StoreError: as :meth:`open`, or a finished one.
        """
        index, arrays = cls._open(folder, fingerprint, writable=True)
        store = cls(folder, arrays, index["meta"])
        try:
            progress = read_json(folder / PROGRESS, needs=("rows", "checksums"))
        except DamagedFile as error:
            raise StoreError(str(error)) from None
        store.rows = progress["rows"]
        for name, array in arrays.items():
            store._digests[name].update(tensor_bytes(array[: store.rows]))
        if store._checksums() != progress["checksums"]:
            raise StoreError(f"{folder}: damaged (the checksum of what was written differs)")
        return store

    @classmethod
    def _open(
        cls, folder: Path, fingerprint: str | None, *, writable: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Index and arrays; the arrays' content is not checked yet."""
        index = read_index(folder, fingerprint, finished=not writable)
        layout = index["arrays"].items()
        return index, {name: _map(folder / f"{name}.bin", spec, writable=writable) for name, spec in layout}

    def append(self, arrays: Mapping[str, Tensor]) -> None:
        """Writes the next rows of every array, from tensors on any device; of one that is not given they stay zero."""
        (count,) = {tensor.shape[0] for tensor in arrays.values()}
        for name, array in self.arrays.items():
            rows = array[self.rows : self.rows + count]
            if name in arrays:
                rows.copy_(arrays[name])
            self._digests[name].update(tensor_bytes(rows))
        self.rows += count

    def save_progress(self) -> None:
        """What has been written so far is not written again, should the process die."""
        write_json(self.folder / PROGRESS, {"rows": self.rows, "checksums": self._checksums()})

    def finish(self) -> "HiddenStore":
        """Writes the checksums: from here on the store is complete. Returns it opened read-only."""
        assert self.rows == len(self), f"{self.rows} of {len(self)} rows are written"
        layout = {n: {"dtype": dtype_name(a.dtype), "shape": list(a.shape)} for n, a in self.arrays.items()}
        self._write_index(layout, self._checksums())
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return HiddenStore(
            self.folder, {n: _map(self.folder / f"{n}.bin", layout[n], writable=False) for n in layout}, self.meta
        )

    def _checksums(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def _write_index(self, layout: dict[str, Any], checksums: dict[str, str] | None) -> None:
        write_index(self.folder, self.meta, layout, checksums)


def write_index(
    folder: Path, meta: Mapping[str, Any], layout: dict[str, Any], checksums: dict[str, str] | None
) -> None:
    """Of a store with arrays of ``layout``; with ``checksums`` it is finished."""
    write_json(folder / INDEX, {"format": FORMAT, "meta": dict(meta), "arrays": layout, "checksums": checksums})


def read_index(folder: Path, fingerprint: str | None, *, finished: bool) -> dict[str, Any]:
    """The index of a store whose files are all there, in their sizes; what is in them is not looked at.

    Raises:
        StoreError: no store there, another fingerprint, not finished (or finished), a file of another size.
    """
    try:
        index = read_json(folder / INDEX, needs=("format", "meta", "arrays", "checksums"))
    except DamagedFile as error:
        raise StoreError(f"{folder}: no hidden store: {error}") from None
    if index["format"] != FORMAT:
        raise StoreError(f"{folder}: format {index['format']}; this version reads {FORMAT}")
    if fingerprint is not None and index["meta"].get("fingerprint") != fingerprint:
        raise StoreError(f"{folder}: holds the hidden states of something else")
    if (index["checksums"] is not None) != finished:
        raise StoreError(f"{folder}: {'not finished' if finished else 'already finished'}")
    for name, spec in index["arrays"].items():
        path = folder / f"{name}.bin"
        if not path.is_file() or path.stat().st_size != spec_bytes(spec):
            raise StoreError(f"{path}: missing or of another size")
    return index


def spec_bytes(spec: dict[str, Any]) -> int:
    """Of an array, by its dtype and shape in an index."""
    size = getattr(torch, spec["dtype"]).itemsize
    for n in spec["shape"]:
        size *= n
    return size


def _map(path: Path, spec: dict[str, Any], *, writable: bool) -> Tensor:
    dtype, size = getattr(torch, spec["dtype"]), spec_bytes(spec)
    if size == 0:  # an empty file cannot be mapped
        return torch.empty(spec["shape"], dtype=dtype)
    # shared=False maps copy-on-write: a stray write cannot reach the file.
    flat = torch.from_file(str(path), shared=writable, size=size // dtype.itemsize, dtype=dtype)
    return flat.view(spec["shape"])
