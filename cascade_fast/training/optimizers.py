"""Optimizers by name, learning-rate schedules, and optimizer state as plain tensors (nothing pickled)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast import ops
from cascade_fast.input_checks import InputError
from cascade_fast.settings import RunSettings
from cascade_fast.training.adamw import AdamW
from cascade_fast.training.adamw8bit import NESTED, AdamW8bit
from cascade_fast.training.sharding import parts_like


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: RunSettings, device: torch.device
) -> torch.optim.Optimizer:
    """``adamw`` is torch's fused AdamW; on a GPU that has the operator, our own with the same state,
    :class:`~cascade_fast.training.adamw.AdamW`. ``adamw8bit`` is our
    :class:`~cascade_fast.training.adamw8bit.AdamW8bit`; where the extension has no kernel for the GPU, bitsandbytes',
    with the same state. ``paged_adamw8bit`` is bitsandbytes' on a GPU and the same as ``adamw8bit`` on the CPU, where
    there is nothing to page.

    Raises:
        InputError: bitsandbytes is needed and not installed.
    """
    if settings.optimizer == "adamw":
        # Parameters that are spread over processes are no plain tensors.
        if device.type != "cpu" and ops.fused("adamw_", device) and settings.shard == "none":
            return AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    own = settings.optimizer == "adamw8bit" and ops.why_not("adamw8bit", device, "cuda") is None
    if own or device.type == "cpu":
        return AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"optimizer: {settings.optimizer!r}; needs bitsandbytes: pip install bitsandbytes ({error})"
        ) from None
    kind = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kind[settings.optimizer](parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def learning_rate(settings: RunSettings, step: int, total_steps: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then constant, or down to 0 linearly or by cosine."""
    warmup = min(settings.warmup_steps, max(total_steps - 1, 0))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(total_steps - warmup, 1)
    if settings.lr_schedule == "linear":
        return settings.lr * (1.0 - done)
    if settings.lr_schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as flat tensors ``"<parameter>.<name>"`` and, apart, what is no tensor.

    No two tensors share memory, as safetensors asks for; the maps of 8-bit states do, and are copied.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in {**entries, **entries.get(NESTED, {})}.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.clone() if name.startswith("qmap") else value
            elif name != NESTED:
                values[f"{index}.{name}"] = value
    return tensors, values


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Puts back what :func:`optimizer_tensors` took out."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {key: parts_like(tensor, parameters[int(key.split(".", 1)[0])]) for key, tensor in tensors.items()}
    for key, value in {**spread, **values}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    saved = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    if getattr(optimizer, "is_paged", False):
        _load_paged(optimizer, saved)
    else:
        optimizer.load_state_dict(saved)


def _load_paged(optimizer: Any, saved: dict[str, Any]) -> None:
    """Loads ``saved`` into a paged optimizer of bitsandbytes and pages its moments again.

    Its own ``load_state_dict`` leaves plain tensors on the GPU, which stay there. Here they stay on the host until they
    are copied into paged buffers, as the GPU may have no room for all of them.
    """
    optimizer.load_state_dict(saved, move_to_device=False)
    for p, entries in optimizer.state.items():
        for name in ("state1", "state2"):
            buffer = optimizer.get_state_buffer(p, dtype=entries[name].dtype)  # a small one is plain, on the GPU
            entries[name] = buffer.copy_(entries[name])
    optimizer.to_gpu()  # what is not paged
