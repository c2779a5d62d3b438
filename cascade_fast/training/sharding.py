"""A stage whose weights, gradients and optimizer state are spread over the processes, with torch's FSDP2: each keeps a
part of every tensor, and has a layer whole only while it runs.

Checkpoints hold whole tensors, so that any number of processes goes on from them.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast.input_checks import InputError
from cascade_fast.runtime.processes import Processes
from cascade_fast.settings import RunSettings


def check_sharding(settings: RunSettings, these: Processes) -> None:
    """Raises InputError where ``settings.shard`` is ``fsdp`` and the stage cannot be spread."""
    if settings.shard == "none":
        return
    reasons = {
        "several processes are needed: start it with torchrun": not these.several,
        f"adapter: {settings.adapter!r}; must be none: an adapter is small": settings.adapter != "none",
        f"head: {settings.head!r}; must be shared": settings.head != "shared",
        f"easy_tokens: {settings.easy_tokens!r}; must be skip": settings.easy_tokens != "skip",
        f"optimizer: {settings.optimizer!r}; must be adamw": settings.optimizer != "adamw",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"shard: 'fsdp'; {reason}")


def sharded(stage: nn.Module, device: torch.device, these: Processes) -> Any:
    """A copy of ``stage`` for training: its parameters are DTensors, those of a layer gathered as it runs. The sum of
    the processes' gradients is what each part gets, as in ``data_parallel.py``."""
    # Here and below: a run of one process needs none of it, and it takes a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shared = [buffer for buffer in stage.buffers() if buffer is not None]
    made: Any = copy.deepcopy(stage, {id(buffer): buffer for buffer in shared})
    mesh = init_device_mesh(device.type, (these.count,))
    for part in (*made.layers, made):
        module: Any = fully_shard(part, mesh=mesh)
        # Its default is the mean on NCCL, and on gloo the sum: here it is the sum everywhere.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return made.to(device)


def is_sharded(module: Any) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def _spread(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole_tensors(tensors: dict[str, Tensor], these: Processes) -> dict[str, Tensor]:
    """The tensors of a checkpoint with every DTensor put together, on the host, one after the other. The others' are
    dropped at once: only the first process writes."""
    found = {}
    for name, tensor in tensors.items():
        full = _whole(tensor).cpu() if _spread(tensor) else tensor
        if these.first:
            found[name] = full
    return found


def parts_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, whole and the same on all processes, spread as ``like`` is, where that is a DTensor."""
    if not _spread(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = like
    return distribute_tensor(tensor.to(like.device), spread.device_mesh, spread.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(module: nn.Module, stage: nn.Module) -> None:
    """The parameters of ``module``, which are spread, into ``stage``, whose are not."""
    into = stage.state_dict()
    for name, value in module.state_dict().items():
        into[name].copy_(_whole(value))


@torch.no_grad()
def load_whole(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads whole tensors into a module whose parameters are spread."""
    for name, value in module.state_dict().items():
        value.copy_(parts_like(tensors[name], value))


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm over all processes' parts."""
    return _whole(torch.nn.utils.get_total_norm(gradients))


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if _spread(tensor) else tensor
    return found
