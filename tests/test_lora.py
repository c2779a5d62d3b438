"""Second looks with LoRA adapters: what they equal, how they learn, and what they refuse."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama_config
from second_look_cases import CPU, HOW, LAYERS, adapter_stage, draw_updates, passed_by_base, save_family_base
from test_quantization import needs_bitsandbytes
from test_stage import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from cascade_fast.input_checks import InputError
from cascade_fast.selection import EVERY_TOKEN, select_hardest
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits, hardest_of_store
from cascade_fast.stages.kind import find_base_for_stages, with_layers
from cascade_fast.stages.lora import FusedProjections, LentLinear, LentNorm, LoraShape, Updates, lend, project
from cascade_fast.stages.second_look import KIND
from cascade_fast.stages.tokens import SequenceTokens

# --- what an untrained one equals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_cascade_is_the_base(adapter_settings, tmp_path, family):
    settings = {**adapter_settings, "base": str(save_family_base(tmp_path / "base", family))}
    base, _, passed = passed_by_base(settings, tmp_path)
    stage, val = adapter_stage(settings, base, passed).eval(), passed.stores["val"]
    assert stage.layers[0].self_attn.q_proj.lora_A.weight.abs().max() > 0
    closed = evaluate_exits([ExitStage(stage, -math.inf)], val, **HOW)
    assert torch.equal(closed.loss_N, val["loss"])
    for threshold, share in ((select_hardest(val["score"], 0.6).threshold, 0.6), (EVERY_TOKEN, 1.0)):
        evaluation = evaluate_exits([ExitStage(stage, threshold)], val, **HOW)
        torch.testing.assert_close(evaluation.loss_N, val["loss"], rtol=1e-5, atol=1e-5)
        assert evaluation.shares(1)["stage_1"] == pytest.approx(share, abs=0.01)


def test_updates_change_what_comes_out_and_a_stage_s_number_changes_how_it_begins(adapter_settings, tmp_path):
    base, _, passed = passed_by_base(adapter_settings, tmp_path)
    settings, val = make_settings(adapter_settings), passed.stores["val"]
    first, second = (KIND.new(settings, base.config, passed, None, number) for number in (1, 2))
    names = [name for name in first.state_dict() if "lora_A" in name]
    assert not any(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in names)
    copied = KIND.new(settings, base.config, passed, draw_updates(first), 2)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), first.parameters(), strict=True))
    changed = evaluate_exits([ExitStage(copied.eval(), EVERY_TOKEN)], val, **HOW)
    assert (changed.loss_N - val["loss"]).abs().max() > 0.01


# --- the products -----------------------------------------------------------------------------------------------------


def _lent(linear: nn.Linear, lora: LoraShape | None) -> LentLinear:
    layer = LentLinear(linear.in_features, linear.out_features, lora)
    stage = SimpleNamespace(layers=[nn.ModuleDict({"linear": layer})], norm=LentNorm(1e-5))
    lend([nn.ModuleDict({"linear": linear})], nn.LayerNorm(4), stage)
    return layer


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("updated", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["each", "fused"])
def test_products_and_gradients_are_those_of_float64(fused, dtype, bias, updated, tokens):
    """Three layers of the same inputs, with sizes and ranks of their own."""
    lora = LoraShape(rank=5, alpha=7.0, targets=LORA_TARGETS)
    plain = [nn.Linear(24, outputs, bias=bias).to(dtype).requires_grad_(False) for outputs in (33, 8, 16)]
    layers = [_lent(linear, lora if new else None) for linear, new in zip(plain, updated, strict=True)]
    for layer in layers:
        draw_updates(layer, scale=0.3)
    before = [linear.weight.clone() for linear in plain]
    if fused:
        layers[0].lent.together = FusedProjections(layers)
        updates = Updates()
        updates.add(layers, layers[0].lent.together)
        updates.place()
    x_KD = torch.randn(tokens, 24, requires_grad=True)
    grads = [torch.randn(tokens, outputs) for outputs in (33, 8, 16)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = project(x_KD, layers)
    assert all(output.dtype == dtype for output in outputs)
    sum((output.float() * grad).sum() for output, grad in zip(outputs, grads, strict=True)).backward()

    exact_x = x_KD.detach().double().requires_grad_()
    exact, learned = [], []
    for linear, layer in zip(plain, layers, strict=True):
        y = exact_x @ linear.weight.double().t() + (linear.bias.double() if bias else 0.0)
        if layer.scale:
            a, b = (part.weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
            y = y + (exact_x @ a.t() @ b.t()) * (7.0 / 5)
            learned += [(layer.lora_A.weight, a), (layer.lora_B.weight, b)]
        exact.append(y)
    sum((y * grad).sum() for y, grad in zip(exact, grads, strict=True)).backward()
    for mine, expected in (
        *zip(outputs, exact, strict=True), (x_KD.grad, exact_x.grad), *((m.grad, e.grad) for m, e in learned)
    ):  # fmt: skip
        error = (mine.detach().double() - expected.detach()).norm() / expected.detach().norm()
        assert error < (1e-6 if dtype == torch.float32 else 0.02)
    assert len(learned) == 2 * sum(updated)
    assert all(mine.grad.dtype == torch.float32 for mine, _ in learned)
    assert all(p.grad is None for linear in plain for p in linear.parameters())
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(plain, before, strict=True))


def test_inputs_without_a_gradient_leave_gradients_to_the_updates_alone():
    layer = _lent(nn.Linear(8, 6, bias=False).requires_grad_(False), LoraShape(2, 4.0, LORA_TARGETS))
    x_KD = torch.randn(5, 8)
    project(x_KD, (layer,))[0].sum().backward()
    assert layer.lora_A.weight.grad is not None  # of a B that is not zero
    assert layer.lora_B.weight.grad.shape == (6, 2)
    assert x_KD.grad is None
    assert torch.equal(layer(x_KD), project(x_KD, (layer,))[0])


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[], ["v_proj", "down_proj"]], ids=["all", "two"])
def test_peft_s_model_with_the_same_updates_has_the_same_losses(adapter_settings, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = {**adapter_settings, "lora_targets": targets}
    base, blocks, passed = passed_by_base(settings, tmp_path)
    stage = draw_updates(adapter_stage(settings, base, passed), scale=0.2).eval()
    evaluation = evaluate_exits([ExitStage(stage, EVERY_TOKEN)], passed.stores["val"], **HOW)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    entry = stage.config.entry_layer
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets or list(LORA_TARGETS),
        layers_to_transform=list(range(entry, entry + LAYERS)),
    )  # fmt: skip
    model = peft.get_peft_model(model, lora).eval()
    named = {}
    for name, tensor in stage.state_dict().items():
        _, number, rest = name.split(".", 2)
        named[f"base_model.model.model.layers.{int(number) + entry}.{rest}"] = tensor
    answer = peft.set_peft_model_state_dict(model, named)
    assert not answer.unexpected_keys
    theirs = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert theirs == set(named)
    ids = blocks.splits["val"].blocks().long()
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.flatten(0, 1)
    expected_N = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(evaluation.loss_N, expected_N, rtol=1e-4, atol=1e-4)
    assert (evaluation.loss_N - passed.stores["val"]["loss"]).abs().max() > 0.05


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage_kind": "append"}, "adapter: 'lora'; stages of kind append have no layers of the base: must be none"),
        ({"adapter": "dora"}, "adapter: 'dora'; must be one of none, lora"),
        ({"lora_targets": ["q_proj", "lm_head"]}, "lora_targets: 'lm_head'; must be one of q_proj, k_proj"),
        ({"lora_rank": 0}, "lora_rank: 0; must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha: 0.0; must be above 0"),
        ({"lora_alpha": math.inf}, "lora_alpha: inf; must be a finite number"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan; must be a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(adapter_settings, changes, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        make_settings({**adapter_settings, **changes})


def test_layers_the_base_does_not_have_are_refused(adapter_settings):
    with pytest.raises(InputError, match=r"layers_per_stage: 4; .* which has 3"):
        find_base_for_stages(make_settings({**adapter_settings, "layers_per_stage": 4}))


def test_targets_are_kept_in_one_order():
    asked = make_settings({"stage_kind": "second-look", "adapter": "lora", "lora_targets": ["up_proj", "q_proj"]})
    shape = LoraShape.from_settings(asked)
    assert shape.targets == ("q_proj", "up_proj")
    assert shape.scale == 2.0
    assert LoraShape.from_dict(shape.to_dict()) == shape
    assert LoraShape.from_settings(make_settings({})) is None


# --- in 4 bit ---------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_a_copy_of_4_bit_layers_is_refused(look_settings, nf4_base):
    settings = {**look_settings, "base": str(nf4_base), "base_quantization": "nf4"}
    with pytest.raises(InputError, match=r"base_quantization: 'nf4'; must be none with stage_kind second-look, .* or"):
        find_base_for_stages(make_settings(settings))
    find_base_for_stages(make_settings({**settings, "adapter": "lora"}))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_on_4_bit_layers_learns_and_leaves_them_alone(adapter_settings, nf4_base, tmp_path, dtype):
    settings = {**adapter_settings, "base": str(nf4_base), "base_quantization": "nf4"}
    base, _, passed = passed_by_base(settings, tmp_path)
    before = {name: tensor.clone() for name, tensor in passed.layers.items()}
    assert any(tensor.dtype == torch.uint8 for tensor in before.values())
    stage, train = adapter_stage(settings, base, passed), passed.stores["train"]
    tokens = SequenceTokens([train], hardest_of_store(train, 0.6).index_K)
    pack, label_K = tokens.batch(torch.arange(4), CPU)

    def loss():
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            return nn.functional.cross_entropy(stage(pack)[1].float() @ stage.head.T, label_K)

    draw_updates(stage, scale=0.05)
    loss().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    # Along its gradient the loss changes as the gradient says.
    gradients = [p.grad.clone() for p in stage.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    ends = []
    for sign in (1.0, -1.0):
        moved = copy.deepcopy(stage.state_dict())
        with torch.no_grad():
            for parameter, gradient in zip(stage.parameters(), gradients, strict=True):
                parameter.add_(gradient, alpha=sign * 0.02 / norm)
        ends.append(loss().item())
        stage.load_state_dict(moved)
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(norm, rel=0.02 if dtype == "float32" else 0.2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in passed.layers.items())


# --- the preset -------------------------------------------------------------------------------------------------------


def test_the_preset_lora_fits_any_base():
    settings = make_settings({"preset": "lora"})
    assert (settings.adapter, settings.hard_ratio, settings.num_stages) == ("lora", 1.0, 1)
    for layers in (2, 30):
        base = tiny_llama_config(num_hidden_layers=layers)
        assert with_layers(settings, base).layers_per_stage == layers
        KIND.check("base", base, with_layers(settings, base))
