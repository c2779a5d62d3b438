"""Training steps as CUDA graphs: all launches of a step, recorded once for each size of batch, are one.

A graph does the same work on the same memory each time. So what differs from step to step is copied into tensors that
stay where they are before it is replayed: the batch, how many of its tokens count, and the learning rate. A size is
recorded when it comes for the second time; the first time its step runs as it is, which makes all that lasts (the
optimizer's state, the loss scale).

Shape legend: M tokens of a batch.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.processes import processes
from cascade_fast.settings import RunSettings

MOST_GRAPHS = 32  # each keeps a batch on the GPU; further sizes run as they are

Step = Callable[[Any, Tensor, Tensor, Tensor], None]


def check_graphs(settings: RunSettings, compute: Compute, micro_batch_tokens: int) -> None:
    """Raises InputError where ``settings.cuda_graph`` is ``on`` and a step of the run cannot be recorded.

    ``micro_batch_tokens``: how many go through a stage at once, by the plan.
    """
    if settings.cuda_graph != "on":
        return
    reasons = {
        f"{processes().count} processes; must be one": processes().several,
        f"device: {str(compute.device)!r}; must be a GPU": compute.device.type != "cuda",
        f"optimizer: {settings.optimizer!r}; must be adamw": settings.optimizer != "adamw",
        f"a batch of {settings.batch_tokens} tokens in parts of {micro_batch_tokens}; must be one, as with a smaller "
        "batch_tokens": micro_batch_tokens < settings.batch_tokens,
        f"easy_tokens: {settings.easy_tokens!r}; must be skip": settings.easy_tokens != "skip",
        f"base_quantization: {settings.base_quantization!r}; must be none with adapter lora": settings.adapter == "lora"
        and settings.base_quantization != "none",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"cuda_graph: 'on'; {reason}, or cuda_graph off")


class Recorder(Protocol):
    """What runs and records steps."""

    def run(self, step: Callable[[], None]) -> None:
        """Runs ``step`` where it may be recorded later."""

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        """Calls ``step`` without doing its work; what comes back does it, on the same memory, whenever it is called."""


class CudaRecorder:
    """CUDA graphs. They share memory for what does not last beyond a step, as one runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], None]) -> None:
        using = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(using)
        with torch.cuda.stream(self.stream):
            step()
        using.wait_stream(self.stream)

    def record(self, step: Callable[[], None]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads send batches and write checkpoints meanwhile, which is none of this graph's business.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


class StepGraphs:
    """Steps of an optimizer, by size of batch.

    Args:
        step: ``step(inputs, label_M, count, lr)``, the whole step. ``inputs``: a tensor, or a dataclass some fields of
            which are tensors; ``count``: how many of the M tokens count, from the first on, and ``lr``, both
            0-dimensional float32 tensors. Reads nothing else that changes from step to step unless it is a tensor that
            stays where it is, and leaves no gradients.
        optimizer: takes a learning rate that is a tensor. Its state may be loaded before the first step, not later.
        recorder: see :class:`Recorder`.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device, recorder: Recorder) -> None:
        assert "capturable" in optimizer.defaults, type(optimizer)
        self.step, self.optimizer, self.recorder = step, optimizer, recorder
        self.count = torch.zeros((), device=device)
        self.lr = torch.zeros((), device=device)
        self.seen = set[Hashable]()
        self.recorded: dict[Hashable, tuple[Any, Tensor, Callable[[], Any]]] = {}

    def run(self, inputs: Any, label_M: Tensor, tokens: int, lr: float) -> None:
        """The step of a batch of which the first ``tokens`` tokens count."""
        self.count.fill_(tokens)
        self.lr.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        size = _size(inputs, label_M)
        if size not in self.recorded and (size not in self.seen or len(self.recorded) == MOST_GRAPHS):
            self.seen.add(size)
            self.recorder.run(lambda: self.step(inputs, label_M, self.count, self.lr))
            return
        if size not in self.recorded:
            self.recorded[size] = self._record(*_copied(inputs, label_M))
        into, label_into, replay = self.recorded[size]
        for name, tensor in _tensors(inputs).items():
            _tensors(into)[name].copy_(tensor)
        label_into.copy_(label_M)
        replay()

    def _record(self, inputs: Any, label_M: Tensor) -> tuple[Any, Tensor, Callable[[], Any]]:
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # it is while it is fused; torch asks all the same
        replay = self.recorder.record(lambda: self.step(inputs, label_M, self.count, self.lr))
        for group in self.optimizer.param_groups:
            group["capturable"] = False  # else torch warns of steps that are not recorded
        return inputs, label_M, replay


def _tensors(inputs: Any) -> dict[str, Tensor]:
    fields = {"": inputs} if isinstance(inputs, Tensor) else vars(inputs)
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _size(inputs: Any, label_M: Tensor) -> Hashable:
    """All that a step is recorded for: shapes, dtypes, and what is no tensor."""
    fields = {"": inputs} if isinstance(inputs, Tensor) else vars(inputs)
    of_inputs = ((name, (v.shape, v.dtype) if isinstance(v, Tensor) else v) for name, v in fields.items())
    return (label_M.shape, *of_inputs)


def _copied(inputs: Any, label_M: Tensor) -> tuple[Any, Tensor]:
    copies = {name: tensor.clone() for name, tensor in _tensors(inputs).items()}
    copied = copies[""] if isinstance(inputs, Tensor) else dataclasses.replace(inputs, **copies)
    return copied, label_M.clone()
