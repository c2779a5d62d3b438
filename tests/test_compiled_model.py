"""The whole model under torch.compile: what is captured is what runs without it, and Inductor rounds no worse."""

import copy

import pytest
import torch
from conftest import text_ids

from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.stages.attention import additive, grouped_attention

slow = pytest.mark.slow  # half a minute or more for one that compiles twice


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def _gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("warm", "bfloat16", marks=slow),
        ("look", "bfloat16"),
        pytest.param("seed", "bfloat16", marks=slow),
        *(pytest.param(name, "float32", marks=slow) for name in ("warm", "seed", "look")),
    ],
)
def test_captured_graphs_compute_the_same_bits(name, dtype, tiny_runs):
    """Without a compiler that fuses: captured, functionalised, differentiated ahead of time, and run as torch does."""
    model, ids = CascadeForCausalLM.from_pretrained(tiny_runs[name], dtype=getattr(torch, dtype)), text_ids()
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        with torch.no_grad():
            without = forward(ids, output_exits=True)
        model.zero_grad()
        output = forward(ids, labels=ids, output_exits=True)
        output.loss.backward()
        assert len(output.exits.unique()) > 1
        results.append((without, output, _gradients(model)))
    (plain_without, plain, plain_grads), (without, output, grads) = results
    assert torch.equal(without.logits, plain_without.logits)
    for part in ("logits", "exits", "loss"):
        assert torch.equal(getattr(output, part), getattr(plain, part)), part
    torch.testing.assert_close(output.scores, plain.scores, rtol=0, atol=0, equal_nan=True)
    assert grads.keys() == plain_grads.keys()
    for parameter, grad in grads.items():  # what adds up to a gradient does so in another order
        wanted = plain_grads[parameter]
        assert (grad - wanted).abs().max() <= 4 * torch.finfo(grad.dtype).eps * wanted.abs().max(), parameter


@slow
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", ["warm", "look"])
def test_inductor_is_as_close_to_float32_as_eager(name, grad, tiny_runs):
    """Their logits differ, as Inductor rounds less often; neither is further from the truth (docs/model.md)."""
    ids, model = text_ids(8, 32), CascadeForCausalLM.from_pretrained(tiny_runs[name], dtype=torch.bfloat16)
    truth = copy.deepcopy(model).float()  # the same weights
    errors = []
    for forward in (model, torch.compile(model)):
        for thresholds in ([-torch.inf] * 2, [torch.inf] * 2):  # the base alone; all through every stage
            with torch.no_grad():
                wanted = truth(ids, thresholds=thresholds).logits
            with torch.set_grad_enabled(grad):
                logits = forward(ids, thresholds=thresholds).logits.detach()
            errors.append((logits.float() - wanted).abs().mean().item())
    eager, compiled = errors[:2], errors[2:]
    print(eager, compiled)
    assert all(error > 0 for error in errors)
    assert all(theirs <= 1.1 * ours for theirs, ours in zip(compiled, eager, strict=True))


@slow
@pytest.mark.parametrize("name", ["warm", "look"])
def test_inductor_in_float32(name, tiny_runs):
    model, ids = CascadeForCausalLM.from_pretrained(tiny_runs[name], dtype=torch.float32), text_ids()
    compiled = torch.compile(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output, plain = (forward(ids, output_exits=True) for forward in (compiled, model))
        assert torch.equal(output.exits, plain.exits)
        torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=1e-4)


def test_inductor_keeps_grouped_attention():
    """Its pattern of attention without groups must not match: the replacement refuses the shapes."""
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = additive(torch.arange(9) <= torch.arange(7)[:, None], torch.float32).expand(2, 1, 7, 9)
    with torch.no_grad():
        compiled = torch.compile(grouped_attention, fullgraph=True)(query, key, value, mask)
        torch.testing.assert_close(compiled, grouped_attention(query, key, value, mask))
