"""16-bit copies of linear layers' weights beside the float32 master weights.

Autocast makes such a copy in every step, and makes the copy's gradient float32 again. Here the layers multiply with
copies that stay: the optimizer writes them as it steps, and reads their gradients as they are. The numbers are the
same.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cascade_fast.training.adamw import AdamW


class HalfWeights:
    """Copies of the weights and biases of ``linears`` that ``optimizer`` trains, in ``dtype``.

    There are none unless the optimizer writes them, ``dtype`` has 16 bits, and a step's gradients come from one
    backward pass: those of several would be added up in 16 bit.

    Args:
        linears: layers whose weights are used for nothing but their products.
        trained: all parameters with a gradient.
        one_pass: whether a step is one forward and backward pass.
    """

    def __init__(
        self,
        linears: Iterable[nn.Linear],
        trained: Iterable[Tensor],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        *,
        one_pass: bool,
    ) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []  # a layer's parameters, and a name there
        if not (isinstance(optimizer, AdamW) and dtype.itemsize == 2 and one_pass):
            return
        of_optimizer = set(map(id, trained))
        for linear in linears:
            for name, master in linear.named_parameters(recurse=False):
                if id(master) in of_optimizer:
                    self.copies.setdefault(master, torch.empty_like(master, dtype=dtype).requires_grad_())
                    self._places.append((linear._parameters, name, master))
        optimizer.copies = self.copies
        self.refresh()

    def leaf(self, master: Tensor) -> Tensor:
        """Where the gradient of ``master`` is found."""
        return self.copies.get(master, master)

    @torch.no_grad()
    def refresh(self) -> None:
        """For whoever changes master weights beside the optimizer: the copies follow."""
        for master, copy in self.copies.items():
            copy.copy_(master)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the layers multiply with the copies; a backward pass may follow outside."""
        for parameters, name, master in self._places:
            parameters[name] = self.copies[master]
        try:
            yield
        finally:
            for parameters, name, master in self._places:
                parameters[name] = master
