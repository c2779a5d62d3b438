"""AdamW on a GPU that has the operator ``adamw_``."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cascade_fast import ops


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with its state, in one call of :func:`cascade_fast.ops.adamw_` a parameter group and step.

    ``grad_scale`` and ``found_inf`` are as in torch's fused optimizers. A step never waits for the device.

    Args:
        parameters: contiguous float32 tensors. Gradients: float32, float16 or bfloat16.
        lr, weight_decay: as in :class:`torch.optim.AdamW`.

    Attributes:
        copies: of some parameters, in float16 or bfloat16. A step writes the new parameter there, too, and reads the
            gradient of the copy where there is one, instead of the parameter's. No part of the state.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Changes the parameters that have a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            leaves = {p: self.copies.get(p, p) for p in group["params"]}
            params = [p for p, leaf in leaves.items() if leaf.grad is not None]
            if not params:
                continue
            states = [self.state[p] or self._new_state(p) for p in params]
            none = torch.empty(0, device=params[0].device)
            copies = [self.copies.get(p, none) for p in params]
            rate = group["lr"]
            ops.adamw_(
                params,
                [leaves[p].grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                copies,
                lr=0.0 if isinstance(rate, Tensor) else rate,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                lr_now=rate if isinstance(rate, Tensor) else None,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
            torch.autograd.graph.increment_version([*params, *(c for c in copies if c is not none)])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        state["step"] = torch.zeros((), device=p.device)
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
        return state
