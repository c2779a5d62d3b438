"""Several linear layers of the same inputs on a GPU: the gradient of the inputs is summed by the products themselves.

Shape legend: K tokens, D inputs, F outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def sums_in_products(x_KD: Tensor, layers: Sequence[Any]) -> bool:
    """Whether :func:`products` serves: more than one linear layer without a bias, training, on a GPU. The CPU keeps
    its sums, and torch.compile makes its own."""
    return (
        x_KD.device.type != "cpu"
        and len(layers) > 1
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
    )


def products(x_KD: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    """What each of ``layers`` makes of the same inputs, ``(K, F)`` each, in the dtype that autocast multiplies in, if
    it is on. In 16 bit the sum of the inputs' gradients is rounded once for each layer, not twice."""
    device = x_KD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_KD.dtype
    return list(_Products.apply(x_KD.to(dtype), *(layer.weight.to(dtype) for layer in layers)))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_KD: Tensor, *weights: Tensor):
        ctx.save_for_backward(x_KD, *weights)
        return tuple(x_KD @ weight_FD.t() for weight_FD in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        x_KD, *weights = ctx.saved_tensors
        of_x_KD = None
        if ctx.needs_input_grad[0]:
            of_x_KD = grads[0] @ weights[0]
            for grad_KF, weight_FD in zip(grads[1:], weights[1:], strict=True):
                of_x_KD.addmm_(grad_KF, weight_FD)
        asked = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return of_x_KD, *(grad_KF.t() @ x_KD if wanted else None for grad_KF, wanted in asked)
