"""AdamW with 8-bit moments, in bitsandbytes' own state."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast import ops
from cascade_fast.ops.reference import BLOCK, dynamic_map

SMALL = 4096  # tensors with fewer elements keep float32 moments
NESTED = "__bnb_optimizer_quant_state__"  # bitsandbytes keeps an 8-bit state's tensors under this name when it saves


class AdamW8bit(torch.optim.Optimizer):
    """One call of :func:`cascade_fast.ops.adamw8bit` for each parameter group and step.

    State: ``step`` (int), ``state1`` and ``state2`` (the moments, uint8 in the parameter's shape), ``absmax1`` and
    ``absmax2`` (float32, one for each 256 elements), ``qmap1`` and ``qmap2`` (the 256 values of the codes). A tensor of
    fewer than 4,096 elements has ``step`` and float32 ``state1`` and ``state2``. ``state_dict()`` loads into
    ``bitsandbytes.optim.AdamW8bit``, and its own loads here.

    As in torch's fused optimizers, a step divides gradients by the attribute ``grad_scale`` and is left out where
    ``found_inf`` is not 0, both ``()`` float32 or None, and never waits for the device. ``state[p]["step"]`` counts
    such steps, too, until ``state_dict()`` asks the device how many there were.

    Args:
        parameters: contiguous float32 tensors, or parameter groups of them. Gradients: float32, float16 or bfloat16.
        lr, betas, eps, weight_decay: as in :class:`torch.optim.AdamW`.

    Raises:
        ValueError: a setting out of range; a parameter that is not float32 or not contiguous (on the first step).
    """

    _step_supports_amp_scaling = True  # what GradScaler goes by
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}: {value}; must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: {betas}; must be in [0, 1)")
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.skipped: Tensor | None = None  # steps left out, on the device: those that `counted` have in common
        self.counted: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure=None):
        """Changes the parameters that have a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if list(map(id, stepped)) != list(map(id, self.counted)):
            self._settle()
            self.counted = stepped
        if self.found_inf is not None and self.skipped is None:
            self.skipped = torch.zeros_like(self.found_inf)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] or self._new_state(p) for p in params]
            steps = [state["step"] + 1 for state in states]
            none = torch.empty(0, device=params[0].device if params else None)
            grads: list[Any] = [p.grad for p in params]
            ops.adamw8bit(
                params,
                grads,
                [state["state1"] for state in states],
                [state["state2"] for state in states],
                [state.get("absmax1", none) for state in states],
                [state.get("absmax2", none) for state in states],
                steps,
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                skipped=self.skipped,
            )
            torch.autograd.graph.increment_version(params)
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        if self.found_inf is not None and self.skipped is not None:
            self.skipped += self.found_inf
        return loss

    def _settle(self) -> None:
        """Takes the steps left out off the parameters' counts; waits for the device if there may be any."""
        if self.skipped is not None:
            left_out = int(self.skipped.item())
            for p in self.counted:
                self.state[p]["step"] -= left_out
            self.skipped = None

    def state_dict(self) -> dict[str, Any]:
        """Waits for the device if there may be steps left out."""
        self._settle()
        return super().state_dict()

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        state["step"] = 0
        coded = p.numel() >= SMALL
        for number in (1, 2):
            state[f"state{number}"] = torch.zeros_like(p, dtype=torch.uint8 if coded else torch.float32)
            if coded:
                state[f"qmap{number}"] = dynamic_map(signed=number == 1)
                state[f"absmax{number}"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a copy of a state of this class or of ``bitsandbytes.optim.AdamW8bit``.

        Raises:
            ValueError: parameter groups, names or tensors that do not fit, or codes of another map.
        """
        saved = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        own = list(chain.from_iterable(group["params"] for group in self.param_groups))
        states = {}
        for index, p in zip(saved, own, strict=False):  # the base class compares the lengths
            if index in state_dict["state"]:
                entries = dict(state_dict["state"][index])
                entries |= entries.pop(NESTED, {})
                states[p] = _copied(entries, p, index)
        self.skipped = None
        # It would turn the codes into floats, too, and therefore sees the groups only.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(states)


def _copied(entries: dict[str, Any], p: Tensor, index: int) -> dict[str, Any]:
    coded = "qmap1" in entries
    dtype = torch.uint8 if coded else torch.float32
    wanted: dict[str, tuple[torch.Size, torch.dtype]] = {"state1": (p.shape, dtype), "state2": (p.shape, dtype)}
    if coded:
        blocks = torch.Size([-(-p.numel() // BLOCK)])
        wanted |= {"absmax1": (blocks, torch.float32), "absmax2": (blocks, torch.float32)}
        wanted |= {"qmap1": (torch.Size([256]), torch.float32), "qmap2": (torch.Size([256]), torch.float32)}
    if set(entries) != {"step", *wanted}:
        raise ValueError(f"state of parameter {index}: {sorted(entries)}; must be {sorted({'step', *wanted})}")
    state: dict[str, Any] = {"step": int(entries["step"])}
    for name, (shape, dtype) in wanted.items():
        tensor = entries[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"state of parameter {index}, {name}: {tuple(tensor.shape)} {tensor.dtype}; "
                f"must be {tuple(shape)} {dtype}"
            )
        if name.startswith("qmap"):  # where the parameter is, nothing reads it
            state[name] = own = dynamic_map(signed=name == "qmap1")
            if not torch.allclose(tensor.cpu(), own, rtol=1e-6, atol=0):
                raise ValueError(f"state of parameter {index}, {name}: not the dynamic map")
        else:
            state[name] = tensor.detach().to(p.device, copy=True).contiguous()
    return state
