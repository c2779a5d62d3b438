"""The hidden store of one split in the making: by one process, by all processes of a run, or shard by shard by jobs.

Several processes make one shard each (see ``shards.py``), and the first one joins them. Shards that are there already,
of jobs or of a run that was interrupted, are used, whatever their number; those that are missing are shared out.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cascade_fast.base.fill_store import BaseNeeds, batches_of, fill_store
from cascade_fast.base.hidden_store import HiddenStore, StoreError
from cascade_fast.base.model import attention_shape
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.shards import SHARD, Chunk, Shards, begun_count, forget_shards
from cascade_fast.criteria import Criterion
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import dtype_name
from cascade_fast.runtime.console import Progress, say
from cascade_fast.runtime.files import LockHeld, acquire_lock
from cascade_fast.runtime.processes import processes

ATTEMPTS = 3  # to make what turns out to be damaged when it is joined


@contextlib.contextmanager
def waiting_lock(path: Path, what: str) -> Iterator[None]:
    """Holds the lock ``path`` of ``what``; says so where it has to wait for another process."""
    try:
        lock = acquire_lock(path, timeout=0)
    except LockHeld as held:
        say(f"{what}: waiting for another run that is at it{held.hint}")
        lock = acquire_lock(path)
    try:
        yield
    finally:
        lock.release()


@dataclass
class SplitStore:
    """The store of ``sequences`` in ``folder``, with ``meta``, which has its fingerprint.

    Attributes:
        criterion: whose scores are kept; ``with_loss``: the losses, too.
        store_dtype: as in the settings.
        device: that of the base.
        whole: the store once it is finished.
        shards: what it is made of, where it is not made as a whole.
        own: the shards that this process is to make, as far as is known before it begins.
    """

    folder: Path
    sequences: Sequences
    needs: BaseNeeds
    criterion: Criterion
    with_loss: bool
    store_dtype: str
    meta: dict[str, Any]
    device: torch.device
    whole: HiddenStore | None = None
    shards: Shards | None = None
    own: list[int] = field(default_factory=list)

    def begin(self, job: tuple[int, int] | None = None) -> None:
        """Finds what is there, and settles what this process makes. The lock of the pass is held.

        Called by all processes of the run, or by a job.

        Args:
            job: of an independent job: the shard it makes, and of how many.

        Raises:
            InputError: jobs of another count of shards have begun.
        """
        these = processes()
        found = these.of_first(self._found(None if job is None else job[1]) if these.first else None)
        if found["finished"]:
            self.whole = self.whole or HiddenStore.open(self.folder, fingerprint=self.meta["fingerprint"], check=False)
        elif found["count"] is not None:
            self.shards = self._cut(found["count"])
            self.own = found["missing"][these.part(len(found["missing"]))] if job is None else [job[0]]

    @property
    def tokens(self) -> int:
        """That this process reads, those included that it finds read."""
        return self.sequences.tokens if self.shards is None else sum(self.shards.work_of(n) for n in self.own)

    def filled(self, model: Any, progress: Progress) -> HiddenStore:
        """The finished store. Called by all processes of the run, after :meth:`begin`.

        Raises:
            NonFiniteScores: names sequence and position.
            StoreError: what has been written is damaged again and again.
        """
        these = processes()
        if self.whole is not None:
            progress.restart(progress.done + self.sequences.tokens)
        elif self.shards is None:
            self.whole = self._filled_alone(model, progress)
        for _ in range(ATTEMPTS):
            if self.whole is not None:
                return self.whole
            self._make_missing(model, progress)
            if these.of_first(self._joined() if these.first else None):
                self.whole = self.whole or HiddenStore.open(self.folder, check=False)
        if self.whole is None:
            raise StoreError(f"{self.folder}: what is written there is damaged when it is read")
        return self.whole

    def make_own(self, model: Any, progress: Progress) -> None:
        """The shard of an independent job, unless it is there."""
        if self.whole is not None:
            progress.restart(progress.done + self.sequences.tokens)
            return
        assert self.shards is not None
        for dtype in self._dtypes(model.dtype):
            if all(self._make(number, dtype, model, progress) for number in self.own):
                return

    def missing(self) -> list[int]:
        """Shards that are not there, or not in the dtype that others need."""
        if self.shards is None or not self.shards.begun():
            return []
        written = self.shards.dtypes()
        widest = dtype_name(torch.float32) if dtype_name(torch.float32) in written else None
        return self.shards.missing(widest)

    # --- what is there ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _batches(self) -> list[slice]:
        return list(batches_of(self.sequences, self.device))

    def _cut(self, count: int) -> Shards:
        of, start_B = self.sequences, self.sequences.start_B.tolist()
        ends = [*start_B, of.tokens]
        chunks = []
        for some in self._batches:
            tokens = slice(ends[some.start], ends[some.stop])
            read = tokens.stop - tokens.start
            rows = read if self.needs.context else int(of.labelled_N[tokens].sum())
            chunks.append(Chunk(rows, read, some.stop - some.start))
        return Shards.cut(self.folder, self.meta["fingerprint"], chunks, count)

    def _found(self, jobs: int | None) -> dict[str, Any]:
        """Whether the store is finished; else of how many shards it is made (None: as a whole), and which are missing.
        ``jobs``: of how many shards independent jobs make it."""
        with contextlib.suppress(StoreError):  # done before the pass was interrupted, or still whole
            self.whole = HiddenStore.open(self.folder, fingerprint=self.meta["fingerprint"])
            forget_shards(self.folder)  # left by a join that was interrupted at its end
            return {"finished": True}
        shards = self._begun(jobs)
        if shards is None:
            count = jobs or processes().count
            if count == 1 and jobs is None:
                return {"finished": False, "count": None}
            shards = self._cut(count)
            shards.begin()
        return {"finished": False, "count": shards.count, "missing": shards.missing()}

    def _begun(self, jobs: int | None) -> Shards | None:
        """Shards that are there and can be gone on with; others are removed, after a line that says so."""
        count, name = begun_count(self.folder), f"base pass, {self.folder.name}"
        if count is None:
            return None
        shards = self._cut(count)
        if shards.begun():
            missing = shards.missing()
            if jobs is not None and jobs != count:
                raise InputError(
                    f"shard: of {jobs}; jobs of {count} shards have begun this pass: give --shard N/{count}, or remove "
                    f"{str(self.folder.parent)!r}"
                )
            if jobs is not None:
                return shards
            if not missing:
                say(f"{name}: all {count} shards are there")
                return shards
            if count >= processes().count:
                say(f"{name}: {count - len(missing)} of {count} shards are there; to be made: {ranges(missing)}")
                return shards
            say(f"{name}: begun in {count} shards, fewer than there are processes now; made anew")
        else:
            say(f"{name}: there are shards of something else; made anew")
        for number in range(1, count + 1):
            with waiting_lock(shards.lock(number), f"{name}, shard {number} of {count}"):
                pass  # a job that was at it is done
        forget_shards(self.folder)
        return None

    # --- making it ----------------------------------------------------------------------------------------------------

    def _dtypes(self, computed: torch.dtype) -> list[torch.dtype]:
        """The dtypes to try, in order, from the widest one on that shards have been written in."""
        dtypes = _store_dtypes(self.store_dtype, computed)
        written = self.shards.dtypes() if self.shards is not None else set()
        return dtypes[max((n for n, dtype in enumerate(dtypes) if dtype_name(dtype) in written), default=0) :]

    def _filled_alone(self, model: Any, progress: Progress) -> HiddenStore:
        """In the narrowest dtype that holds what the base computes."""
        start = progress.done
        rows = self.sequences.tokens if self.needs.context else self.sequences.labels
        for dtype in _store_dtypes(self.store_dtype, model.dtype):
            store = self._resume_or_create(self.folder, rows, dtype, model.config, self.meta)
            progress.restart(start)
            if fill_store(model, self.sequences, store, self.needs, self.criterion, progress):
                return store.finish()
        raise AssertionError("float32 and bfloat16 hold every finite hidden state")

    def _make_missing(self, model: Any, progress: Progress) -> None:
        """All processes, each its share: in the narrowest dtype that holds what all of them compute."""
        these, shards = processes(), self.shards
        assert shards is not None
        names = these.of_first([dtype_name(d) for d in self._dtypes(model.dtype)] if these.first else None)
        start = progress.done
        for name in names:
            progress.restart(start)
            missing = these.of_first(shards.missing(name) if these.first else None)
            own = missing[these.part(len(missing))]
            too_large = not all(self._make(number, getattr(torch, name), model, progress) for number in own)
            if not these.largest([int(too_large)])[0]:
                if these.several and these.first:
                    shards.await_others(name)
                return

    def _make(self, number: int, dtype: torch.dtype, model: Any, progress: Progress) -> bool:
        """Makes a shard unless it is there; False as soon as a hidden state does not fit its dtype."""
        shards, start = self.shards, progress.done
        assert shards is not None
        if not shards.begun():  # joined by another run
            progress.restart(start + shards.work_of(number))
            return True
        with waiting_lock(shards.lock(number), f"base pass, {self.folder.name}, shard {number} of {shards.count}"):
            if not shards.begun() or shards.finished(number, dtype_name(dtype)):  # joined, or made, while this waited
                progress.restart(start + shards.work_of(number))
                return True
            meta = shards.meta(number, self.meta)
            store = self._resume_or_create(shards.path(number), shards.rows_of(number), dtype, model.config, meta)
            batches = self._batches[shards.chunks(number)]
            if not fill_store(model, self.sequences, store, self.needs, self.criterion, progress, batches):
                progress.restart(start)
                return False
            shards.finish(store)
        return True

    def _joined(self) -> bool:
        """Joins the shards; False, after a line that says why, where some have to be made again."""
        assert self.shards is not None
        try:
            self.whole = self.shards.join(self.meta)
        except StoreError as error:
            say(f"base pass: {error}; what is damaged is made anew")
        return self.whole is not None

    def _resume_or_create(
        self, folder: Path, rows: int, dtype: torch.dtype, base_config: Any, meta: dict[str, Any]
    ) -> HiddenStore:
        """The store of an interrupted pass, or a new one."""
        try:
            store = HiddenStore.resume(folder, fingerprint=meta["fingerprint"])
            if store.hidden.dtype == dtype and len(store) == rows and store.meta.get(SHARD) == meta.get(SHARD):
                return store
        except StoreError:
            pass  # nothing usable there: begin anew
        kv_shape = None
        if self.needs.keys_and_values:
            _, kv_heads, head_dim = attention_shape(base_config)
            kv_shape = (self.needs.last_layers, 2, kv_heads, head_dim)
        return HiddenStore.create(
            folder, rows, base_config.hidden_size, dtype, with_loss=self.with_loss, meta=meta, kv_shape=kv_shape
        )


def _store_dtypes(store_dtype: str, computed: torch.dtype) -> list[torch.dtype]:
    """The dtypes to try, in order; what was computed in bfloat16 loses nothing in bfloat16."""
    if store_dtype == "float32":
        return [torch.float32]
    return [torch.bfloat16] if computed == torch.bfloat16 else [torch.float16, torch.float32]


def ranges(numbers: list[int]) -> str:
    """Ascending numbers for people: ``1, 4-9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
