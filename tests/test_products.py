"""Linear layers of the same inputs whose inputs' gradient is summed by the products: against torch's, on the CPU."""

import pytest
import torch
from torch import nn

from cascade_fast.stages.products import products, sums_in_products


def layers_of(sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Linear(6, size, bias=False, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_gradients_are_those_of_torch(tokens, frozen):
    layers = layers_of((4, 3, 7), torch.float64)
    if frozen is not None:
        layers[frozen].weight.requires_grad_(False)
    results = []
    for run in (lambda x: products(x, layers), lambda x: [layer(x) for layer in layers]):
        x = torch.randn(tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = run(x)
        wanted = [x, *(layer.weight for layer in layers if layer.weight.requires_grad)]
        grads = torch.autograd.grad(sum((out * out).sum() for out in outputs), wanted)
        results.append([*(out.detach() for out in outputs), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_that_ask_for_no_gradient():
    layers, x = layers_of((4, 3)), torch.ones(2, 6)
    sum(out.sum() for out in products(x, layers)).backward()
    for layer in layers:
        torch.testing.assert_close(layer.weight.grad, torch.full_like(layer.weight, 2.0))


def test_autocast_s_dtype_and_float32_gradients_of_weights():
    layers, x = layers_of((4, 3)), torch.randn(5, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = products(x, layers)
        expected = [layer(x) for layer in layers]
    for one, other in zip(outputs, expected, strict=True):
        assert torch.equal(one, other)
    sum(out.float().sum() for out in outputs).backward()
    assert x.grad.dtype == layers[0].weight.grad.dtype == torch.float32


def test_who_keeps_torch_s_sums():
    layers = layers_of((4, 3))
    meta = torch.empty(2, 6, device="meta")
    assert sums_in_products(meta, layers)
    assert not sums_in_products(torch.empty(2, 6), layers)  # the CPU, whose bits stay
    assert not sums_in_products(meta, layers[:1])
    assert not sums_in_products(meta, [layers[0], nn.Linear(6, 3)])
    with torch.no_grad():
        assert not sums_in_products(meta, layers)
