"""A hidden store made in parts: processes or jobs fill one *shard* each, and one of them joins the shards.

What a store holds is computed chunk by chunk, in an order that does not depend on who computes: a shard is the rows of
a contiguous range of chunks, as even as whole chunks allow, and the shards one after another are, byte for byte, the
store that one process would have written. While it is made, its folder has ``shards/`` with

====================  =================================================================================================
``manifest.json``     fingerprint, how many shards there are, and of each which chunks, sequences and rows it holds
``00001-of-00003/``   a hidden store of its own, finished or under way
``00001-of-00003.lock``  held by the process that is at it
``joined.json``       how many shards have been taken into the store, with its arrays and their checksums so far
====================  =================================================================================================

A shard is removed once it has been taken in: beside the store, the disk holds what is left to join. With the last one
the folder ``shards/`` goes, and what is left is an ordinary store.
"""

import bisect
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from cascade_fast.base.hidden_store import INDEX, HiddenStore, StoreError, read_index, spec_bytes, write_index
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import DamagedFile, read_json, room_for, write_json
from cascade_fast.runtime.processes import processes

FOLDER, MANIFEST, JOINED = "shards", "manifest.json", "joined.json"
SHARD = "shard"  # in a shard's meta: its number and how many there are
PIECE = 2**22  # bytes that are copied at once
SECONDS = 60.0  # after which a shard that another machine has finished must be seen


@dataclass(frozen=True)
class Chunk:
    """Of a store's rows, those that are computed together.

    Attributes:
        rows: how many the store has of it.
        work: what it takes, such as tokens that are read; shards are even in it.
        sequences: how many the chunk reads.
    """

    rows: int
    work: int
    sequences: int = 0


@dataclass(frozen=True)
class Shards:
    """The shards of the store in ``folder``; their numbers count from 1.

    Attributes:
        bounds: of the ranges of chunks, from 0, one more than there are shards; ``rows``, ``work`` and ``sequences``
            likewise of what comes before each.
    """

    folder: Path
    fingerprint: str | None
    bounds: list[int]
    rows: list[int]
    work: list[int]
    sequences: list[int]

    @classmethod
    def cut(cls, folder: Path, fingerprint: str | None, chunks: Sequence[Chunk], count: int) -> "Shards":
        """``count`` shards of the store that ``chunks`` make."""
        rows, work, sequences = (
            list(accumulate((getattr(chunk, name) for chunk in chunks), initial=0))
            for name in ("rows", "work", "sequences")
        )
        middles = [before + after for before, after in pairwise(work)]  # twice, to stay whole
        inner = [bisect.bisect_left(middles, 2 * work[-1] * n / count) for n in range(1, count)]
        bounds = [0, *inner, len(chunks)]
        return cls(folder, fingerprint, bounds, *([of[bound] for bound in bounds] for of in (rows, work, sequences)))

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    def path(self, number: int) -> Path:
        return self.folder / FOLDER / f"{number:05d}-of-{self.count:05d}"

    def lock(self, number: int) -> Path:
        """What keeps a second process from the shard."""
        return self.path(number).with_suffix(".lock")

    def chunks(self, number: int) -> slice:
        return slice(self.bounds[number - 1], self.bounds[number])

    def rows_of(self, number: int) -> int:
        return self.rows[number] - self.rows[number - 1]

    def work_of(self, number: int) -> int:
        return self.work[number] - self.work[number - 1]

    def meta(self, number: int, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Of a shard of the store with ``meta``."""
        return {**meta, SHARD: [number, self.count]}

    def manifest(self) -> dict[str, Any]:
        """What ties the shards."""
        ranges = {"chunks": self.bounds, "sequences": self.sequences, "rows": self.rows}
        return {
            "fingerprint": self.fingerprint,
            "count": self.count,
            "shards": [
                {SHARD: n, **{name: [of[n - 1], of[n]] for name, of in ranges.items()}}
                for n in range(1, self.count + 1)
            ],
        }

    def begun(self) -> bool:
        """Whether these shards are being made, or wait to be joined."""
        try:
            return read_json(self.folder / FOLDER / MANIFEST) == self.manifest()
        except DamagedFile:
            return False

    def begin(self) -> None:
        """Writes the manifest; what else is in the folder, unless it is of these shards, is removed."""
        if not self.begun():
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(self.folder / FOLDER / MANIFEST, self.manifest())

    def finished(self, number: int, dtype: str | None = None) -> bool:
        """Whether a shard is there, or in the store already; with hidden states in ``dtype``, if one is given."""
        if number <= self._joined().get("taken", 0):
            return True
        try:
            index = self._index(number)
        except StoreError:
            return False
        return dtype in (None, index["arrays"]["hidden"]["dtype"])

    def missing(self, dtype: str | None = None) -> list[int]:
        """The numbers of those that are not there, in ``dtype``."""
        return [number for number in range(1, self.count + 1) if not self.finished(number, dtype)]

    def await_others(self, dtype: str | None = None) -> None:
        """Until those that other machines have finished are seen here, where it takes the file system a while."""
        end = time.monotonic() + SECONDS
        while self.missing(dtype) and time.monotonic() < end:
            time.sleep(0.1)

    def dtypes(self) -> set[str]:
        """Those in which hidden states have been written, be it in part."""
        found = set()
        for path in (self.folder / FOLDER / JOINED, *(self.path(n) / INDEX for n in range(1, self.count + 1))):
            try:
                found.add(str(read_json(path, needs=("arrays",))["arrays"]["hidden"]["dtype"]))
            except DamagedFile:
                continue
        return found

    def finish(self, store: HiddenStore) -> None:
        """Of one that has all its rows: whoever sees that it is finished sees all of it, on another machine too."""
        for name in store.arrays:
            with (store.folder / f"{name}.bin").open("rb") as file:
                os.fsync(file.fileno())
        store.finish()

    def _index(self, number: int) -> dict[str, Any]:
        """Of a finished shard. Raises StoreError."""
        path = self.path(number)
        index = read_index(path, self.fingerprint, finished=True)
        rows = {spec["shape"][0] for spec in index["arrays"].values()}
        if index["meta"].get(SHARD) != [number, self.count] or rows != {self.rows_of(number)}:
            raise StoreError(f"{path}: another shard")
        return index

    # --- joining -----------------------------------------------------------------------------------------------------

    def join(self, meta: Mapping[str, Any]) -> HiddenStore:
        """Makes the store, with ``meta``, of the shards; one that was interrupted goes on where it stopped.

        Raises:
            StoreError: a shard is missing or damaged. It is removed: make it again, and then join again. Likewise all
                of them, where what has been joined so far is damaged.
        """
        digests = self._joined_digests()
        for number in range(self._joined().get("taken", 0) + 1, self.count + 1):
            try:
                self._take(number, digests)
            except StoreError:
                shutil.rmtree(self.path(number), ignore_errors=True)
                raise
            shutil.rmtree(self.path(number))
        joined = self._joined()
        write_index(self.folder, meta, joined["arrays"], joined["checksums"])
        forget_shards(self.folder)
        return HiddenStore.open(self.folder, check=False)

    def _joined(self) -> dict[str, Any]:
        """How far the shards have been joined; empty where nothing has."""
        try:
            return read_json(self.folder / FOLDER / JOINED, needs=("taken", "arrays", "checksums"))
        except DamagedFile:
            return {}

    def _joined_digests(self) -> dict[str, Any]:
        """SHA-256 of each array so far.

        Raises:
            StoreError: they are not those that were written.
        """
        joined = self._joined()
        digests = {name: hashlib.sha256() for name in joined.get("arrays", {})}
        for name, spec in joined.get("arrays", {}).items():
            left, path = spec_bytes(spec), self.folder / f"{name}.bin"
            if path.is_file():
                with path.open("rb") as file:
                    while left and (piece := file.read(min(PIECE, left))):
                        digests[name].update(piece)
                        left -= len(piece)
            if digests[name].hexdigest() != joined["checksums"][name]:
                shutil.rmtree(self.folder)
                self.begin()
                raise StoreError(f"{path}: damaged (checksum differs)")
        return digests

    def _take(self, number: int, digests: dict[str, Any]) -> None:
        """Appends a shard to the store's files."""
        index, joined = self._index(number), self._joined()
        before = joined.get("arrays", {})
        layout = {name: {**spec, "shape": list(spec["shape"])} for name, spec in index["arrays"].items()}
        if before and {n: (s["dtype"], s["shape"][1:]) for n, s in before.items()} != {
            n: (s["dtype"], s["shape"][1:]) for n, s in layout.items()
        }:
            raise StoreError(f"{self.path(number)}: other arrays than those of the shards before it")
        with room_for(self.folder, sum(spec_bytes(spec) for spec in layout.values())):
            for name, spec in layout.items():
                source, target = self.path(number) / f"{name}.bin", self.folder / f"{name}.bin"
                start = spec_bytes(before[name]) if before else 0
                checksum = _append(source, target, start, digests.setdefault(name, hashlib.sha256()))
                if checksum != index["checksums"][name]:
                    raise StoreError(f"{source}: damaged (checksum differs)")
                spec["shape"][0] = self.rows[number]
        checksums = {name: digest.hexdigest() for name, digest in digests.items()}
        write_json(self.folder / FOLDER / JOINED, {"taken": number, "arrays": layout, "checksums": checksums})


def _append(source: Path, target: Path, start: int, digest: Any) -> str:
    """Copies all of ``source`` to place ``start`` of ``target``, the end from now on; SHA-256 of what was copied.
    ``digest`` takes it in, too."""
    copied = hashlib.sha256()
    with source.open("rb") as read, target.open("ab") as write:
        write.truncate(start)  # what a join that was interrupted has written further
        while piece := read.read(PIECE):
            copied.update(piece)
            digest.update(piece)
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
    return copied.hexdigest()


def begun_count(folder: Path) -> int | None:
    """How many shards the store in ``folder`` is being made of; None where there are none."""
    try:
        return int(read_json(folder / FOLDER / MANIFEST, needs=("count",))["count"])
    except DamagedFile:
        return None


def forget_shards(folder: Path) -> None:
    """Removes those of the store in ``folder``, where it is whole or they are of no use."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def store_of_all(
    folder: Path,
    rows: Sequence[int],
    meta: dict[str, Any],
    create: Callable[[Path, int, dict[str, Any]], HiddenStore],
    fill: Callable[[HiddenStore, slice], object],
) -> HiddenStore:
    """The finished store in ``folder``, made if it is not there or damaged: each process of the run computes its part.

    Called by all of them, which must see one file system. One process alone writes the store as a whole.

    Args:
        rows: how many rows each chunk of it has.
        create: makes a store to write in: its folder, rows and meta.
        fill: appends a range of the chunks to it.

    Raises:
        InputError: the folder is not the same one to all processes.
    """
    these, whole = processes(), None
    if these.first:
        with contextlib.suppress(StoreError):
            whole = HiddenStore.open(folder)
    if these.of_first(whole is not None):
        return whole or HiddenStore.open(folder, check=False)
    if not these.several:
        store = create(folder, sum(rows), meta)
        fill(store, slice(0, len(rows)))
        return store.finish()
    chunks = [Chunk(count, count) for count in rows]
    shards, number = Shards.cut(folder, meta.get("fingerprint"), chunks, these.count), these.rank + 1
    if these.first:
        shutil.rmtree(folder, ignore_errors=True)
        shards.begin()
    these.wait()
    store = create(shards.path(number), shards.rows_of(number), shards.meta(number, meta))
    fill(store, shards.chunks(number))
    shards.finish(store)
    these.wait()
    if these.first:
        shards.await_others()
        if missing := shards.missing():
            raise InputError(
                f"{str(folder)!r}: must be on a file system that all processes of the run see, and what process "
                f"{missing[0] - 1} has written is not there"
            )
        shards.join(meta)
    these.wait()
    return HiddenStore.open(folder, check=False)
