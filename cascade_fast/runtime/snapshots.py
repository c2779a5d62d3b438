"""Tensors written while training goes on: a snapshot of them is taken in the host's memory, and a thread hashes and
writes it. hashlib, safetensors and the system's writes let other threads run meanwhile.

Where memory is short nothing is copied: the file is then written before training goes on.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from cascade_fast.runtime.compute import free_ram_bytes, wait_for
from cascade_fast.runtime.console import say

# Of the free memory, that a snapshot may take. Pinned memory comes in powers of two: on a GPU it may be twice as much.
SHARE_OF_FREE_RAM = 0.25


def snapshot_fits(size: float, free: float) -> bool:
    """Whether a snapshot of ``size`` bytes is taken where ``free`` bytes are free."""
    return size <= SHARE_OF_FREE_RAM * free


class SnapshotWriter:
    """Writes snapshots in the background, one at a time. A context manager: at its end what is being written is there.

    Args:
        device: that changes the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[str, Tensor] = {}  # of the last snapshot; the next one goes to the same places
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor]], object]) -> None:
        """Has ``write`` called with what ``tensors`` hold now; they may be changed as soon as this returns.

        Waits for the snapshot before. Raises what the writing of that one has raised; nothing new is written then.
        """
        self.wait()
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if not self.has_room(tensors):
            write(tensors)
            return
        arrived = self._copy(tensors)
        snapshot = {name: self._copies[name] for name in tensors}

        def run() -> None:
            try:
                if arrived is not None:
                    arrived.synchronize()
                write(snapshot)
            except BaseException as error:  # for whoever waits
                self._error = error

        # No daemon: the interpreter waits for it, however the program ends.
        self._thread = threading.Thread(target=run, name="snapshot writer")
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is there. Raises what its writing has raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def has_room(self, tensors: dict[str, Tensor]) -> bool:
        """Whether there is memory for a snapshot beside what is there already."""
        new = sum(t.nbytes for name, t in tensors.items() if not self._has_place(name, t))
        return new == 0 or snapshot_fits(new, free_ram_bytes())

    def _has_place(self, name: str, tensor: Tensor) -> bool:
        copy = self._copies.get(name)
        return copy is not None and copy.shape == tensor.shape and copy.dtype == tensor.dtype

    def _copy(self, tensors: dict[str, Tensor]) -> torch.cuda.Event | None:
        """The tensors into ``_copies``; on a GPU they are there after the event that is returned.

        The copies are queued behind the steps so far and before the next one, so that no step changes what they read.
        """
        on_gpu = self.device.type == "cuda"
        wait_for(self.device)  # a paged optimizer's state is copied by the host itself
        for name, tensor in tensors.items():
            if not self._has_place(name, tensor):
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._copies[name].copy_(tensor, non_blocking=True)
        if not on_gpu:
            return None
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))
        return arrived

    def __enter__(self) -> "SnapshotWriter":
        return self

    def __exit__(self, _kind: object, raised: BaseException | None, _trace: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if raised is None:
                raise
            say(f"  {error}")  # what ends training is raised; this shall not be lost
        finally:
            self._copies.clear()
