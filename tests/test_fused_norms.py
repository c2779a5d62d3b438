"""Layers on a GPU call the fused operators; the base's norms are one launch, its rotary positions two: counted on a
pretend card."""

from cuda_cases import needs_pretend_gpu, on_pretend_card

# Prints launches by operator, and how far a layer on the card is from the CPU's. The card's kernels cannot run here:
# the extension's CPU bodies stand in for them.
PRETEND = """
import collections, copy, json, pretend_gpu
pretend_gpu.install("gpu", card="t4", poison=True)
import torch
from cascade_fast.base.fused_norms import fused_norms
from cascade_fast.base.fused_rotation import fused_rotation
from cascade_fast.ops import backends
from cascade_fast.stages.append import AppendedLayer
from cascade_fast.stages.stage import StageConfig
from second_look_cases import family_model

plain, found = backends._native_op, {}
backends._native_op = lambda op, key: plain(op, "CPU") if op in backends.LAYER_OPS else plain(op, key)

def outputs_of(layer, device):
    layer = copy.deepcopy(layer).to(device)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).to(device)
    total, normed = layer.input_layernorm.after(*layer(x.requires_grad_(), None))
    (total.sin() + normed).sum().backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [t.detach().cpu() for t in (total, normed, x.grad, *grads)]

with pretend_gpu.as_cuda():
    base = family_model("qwen3").eval().requires_grad_(False)  # which has norms of heads, too
    shape = StageConfig.from_base(base.config, layers=1, init="identity", head="shared", reads="residual")
    layer = AppendedLayer(shape)
    wanted = outputs_of(layer, "cpu")
    with pretend_gpu.ledger() as led:
        got = outputs_of(layer, "cuda")
    found["calls"] = collections.Counter(k.op.split(".")[1] for k in led.kernels if "cascade_fast" in k.op)
    found["layer"] = [max((a - b).abs().max().item() for a, b in zip(wanted, got, strict=True))]

    tokens = torch.arange(24).view(2, 12)
    for dtype in (torch.float32, torch.float16):
        cpu = base.to("cpu", dtype).model(tokens).last_hidden_state.float()
        with fused_norms(base):
            found.setdefault("cpu", []).append(torch.equal(base.model(tokens).last_hidden_state.float(), cpu))
        model = base.to("cuda").model
        with pretend_gpu.ledger() as before:
            model(tokens.to("cuda"))
        with fused_norms(base), pretend_gpu.ledger() as after:
            fused = model(tokens.to("cuda")).last_hidden_state
        found.setdefault("base", []).append((fused.float().cpu() - cpu).abs().max().item())
        saved = sum(type(m).__name__ == "Qwen3RMSNorm" for m in base.modules())
        found.setdefault("saved", []).append((before.launches - after.launches) / saved)
        assert "forward" not in vars(base.model.norm)

    for family in ("llama", "mistral", "qwen2", "qwen3"):
        for dtype in (torch.float32, torch.float16):
            base, other = family_model(family).eval().to(dtype), family_model(family).eval()
            cpu, of_other = (model.model(tokens).last_hidden_state for model in (base, other))
            with fused_rotation(base):
                unchanged = torch.equal(base.model(tokens).last_hidden_state, cpu)
            base.to("cuda")
            with pretend_gpu.ledger() as before:
                composed = base.model(tokens.to("cuda")).last_hidden_state
            with fused_rotation(base):
                with pretend_gpu.ledger() as after:
                    fused = base.model(tokens.to("cuda")).last_hidden_state
                unchanged &= torch.equal(other.model(tokens).last_hidden_state, of_other)
            calls = sum("rotate_rows" in k.op for k in after.kernels)
            assert torch.equal(base.model(tokens.to("cuda")).last_hidden_state, composed)  # as it was
            off = (fused.float().cpu() - cpu.float()).abs().max().item()
            saved = (before.launches - after.launches) / len(base.model.layers)
            found.setdefault("rotation", []).append([unchanged, calls / len(base.model.layers), saved, off])
print(json.dumps(found))
"""


@needs_pretend_gpu
def test_layers_and_the_base_on_a_pretend_card():
    found = on_pretend_card(PRETEND)
    once = ("silu_mul", "silu_mul_backward", "rms_norm", "rms_norm_backward")
    assert found["calls"] == {"add_rms_norm": 2, "add_rms_norm_backward": 2, **dict.fromkeys(once, 1)}
    assert found["layer"][0] < 1e-5
    assert found["cpu"] == [True, True]
    assert found["base"][0] < 1e-5
    assert found["base"][1] < 0.02
    assert min(found["saved"]) >= 5  # of a norm; in float32 nothing is cast
    assert len(found["rotation"]) == 8
    for number, (unchanged, calls, saved, off) in enumerate(found["rotation"]):
        assert unchanged  # on the CPU, and another model meanwhile
        assert calls == 2
        assert saved >= 4  # of a layer; the angles are made once for a few of them
        assert off < (0.02 if number % 2 else 1e-5)
