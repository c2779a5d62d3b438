"""The processes of one run, as torchrun, ``accelerate launch`` or srun start them; or one alone.

All of them do the same, each its part of the work; files, messages and decisions are the first one's. Between them
there is torch.distributed: NCCL for tensors on GPUs, gloo for tensors on the host. Nothing is pickled.
"""

import datetime
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec

from cascade_fast.input_checks import InputError

TIMEOUT = datetime.timedelta(hours=12)  # of a wait for others; one that has died is noticed at once
P = ParamSpec("P")
FAILED = "cascade_fast/failed"  # counts the processes that have ended with an error


@dataclass(frozen=True)
class Processes:
    """Who this process is among those of the run. Methods that end with all of them are called by all of them.

    Attributes:
        rank: from 0; across all machines.
        count: how many there are.
        local_rank: from 0; on this machine.
        store: what they share before and beside torch.distributed; None where one is alone.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this one writes, speaks and decides."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def wait(self) -> None:
        """Until all have come here."""
        if self.several:
            self.largest([0])

    def largest(self, numbers: list[int]) -> list[int]:
        """Place by place the largest of what all processes give; on the host, whatever the device is at."""
        if not self.several:
            return numbers
        import torch
        import torch.distributed as dist

        given = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(given, op=dist.ReduceOp.MAX)
        return [int(number) for number in given]

    def sum_(self, tensor: Any) -> Any:
        """``tensor`` becomes the sum of what all processes give, in place, on its device; the same bits everywhere."""
        if self.several:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def rows(self, part: Any) -> Any:
        """The rows of all processes, in the order of their ranks: ``(N, ...)`` of ``part`` ``(n, ...)`` on the host.
        ``n`` may differ."""
        if not self.several:
            return part
        import torch
        import torch.distributed as dist

        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(counts, torch.tensor([len(part)]))
        most = max(int(count) for count in counts)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)])

    def of_first(self, value: Any) -> Any:
        """What the first process gives, for all of them: plain values, as JSON has them."""
        if not self.several:
            return value
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.first else b""
        (size,) = self.largest([len(text)])
        data = torch.zeros(size, dtype=torch.uint8)
        if self.first:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process does what follows, then the others: they find in a cache what it has made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def part(self, size: int) -> slice:
        """This process's share of ``size`` things in a row; shares differ by one at most."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)


ALONE = Processes()
_these = ALONE
_stays_alone = False


def processes() -> Processes:
    """Those of this run, once :func:`start_processes` has been called; one alone before."""
    return _these


def stay_alone() -> None:
    """This process is a job by itself, however it was started."""
    global _stays_alone
    _stays_alone = True


def start_processes() -> Processes:
    """Joins the processes that were started together, as the environment tells; one that is alone stays so.

    With a GPU for each process they use NCCL, else gloo.

    Raises:
        InputError: the environment does not say how to find the others.
    """
    global _these
    rank, count, local_rank = _environment()
    if count == 1 or _these.several:
        return _these
    _say_where()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", local_rank)):
        os.environ[name] = str(value)
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK: {local_rank}; this machine has {torch.cuda.device_count()} CUDA GPUs: start one process "
                "for each, as torchrun --nproc-per-node does"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    _these = Processes(rank, count, local_rank, store)
    return _these


def end_processes() -> None:
    """Leaves the others in good order: all of them are done."""
    global _these
    if _these.several:
        import torch.distributed as dist

        _these.wait()
        dist.destroy_process_group()
        _these = ALONE


def by_first(work: Callable[P, None]) -> Callable[P, None]:
    """``work`` of the first process alone: once all have come to it, and before any goes on."""

    @functools.wraps(work)
    def called(*args: P.args, **kwargs: P.kwargs) -> None:
        _these.wait()
        if _these.first:
            work(*args, **kwargs)
        _these.wait()

    return called


def speaks() -> bool:
    """Whether messages are this process's to give; also before the processes have been started."""
    if _these.several:
        return _these.first
    try:
        return _environment()[0] == 0
    except InputError:  # which is about to be said
        return True


def first_to_fail() -> bool:
    """Whether no other process has ended with an error before: what follows elsewhere follows from it."""
    if not _these.several:
        return speaks()
    try:
        return bool(_these.store.add(FAILED, 1) == 1)
    except RuntimeError:  # whoever kept the store is gone
        return _these.first


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone."""
    if not _these.several:
        return False
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "connection refused")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def started_count() -> int:
    """How many processes the environment says have been started together."""
    return _environment()[1]


def _environment() -> tuple[int, int, int]:
    """Rank, count and local rank, as torchrun and ``accelerate launch`` say, or srun; of one alone 0, 1, 0."""
    if _stays_alone:
        return 0, 1, 0
    if "WORLD_SIZE" in os.environ:
        rank = _number("RANK", 0)
        return rank, _number("WORLD_SIZE", 1), _number("LOCAL_RANK", rank)
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:  # else a shell that waits for srun
        return _number("SLURM_PROCID", 0), _number("SLURM_NTASKS", 1), _number("SLURM_LOCALID", 0)
    return 0, 1, 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise InputError(f"{name}: {text!r}; in the environment, must be a number")
    return int(text)


def _say_where() -> None:
    """Of processes that srun has started: where the first one is; torchrun says it by itself.

    Raises:
        InputError: nobody says it.
    """
    given = os.environ
    if "WORLD_SIZE" not in given:
        if given.get("SLURM_NNODES", "1") == "1":
            given.setdefault("MASTER_ADDR", "127.0.0.1")
        given.setdefault("MASTER_PORT", str(20000 + _number("SLURM_JOB_ID", 0) % 10000))
    for name, what in (("MASTER_ADDR", "the machine"), ("MASTER_PORT", "a free port")):
        if name not in given:
            raise InputError(f"{name}: not set; with several processes it names {what} of the first one")
