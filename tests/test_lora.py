"""Second looks with LoRA adapters: what they equal, what they learn and leave alone, and what they refuse."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, english_texts, tiny_llama_config
from run_faults import differences, epochs_told, small_run
from safetensors.torch import load_file
from second_look_cases import HOW, LAYERS, draw_updates, passed_by_base
from test_quantization import needs_bitsandbytes
from test_stage import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from cascade_fast.base import base_pass as base_pass_module
from cascade_fast.base.model import find_base
from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import load_tensors
from cascade_fast.selection import EVERY_TOKEN, select_hardest
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits, hardest_of_store
from cascade_fast.stages.kind import find_base_for_stages, with_layers
from cascade_fast.stages.lora import FusedProjections, LentLinear, LentNorm, LoraShape, Updates, lend, project
from cascade_fast.stages.second_look import KIND
from cascade_fast.stages.tokens import SequenceTokens

CPU = torch.device("cpu")


@pytest.fixture
def adapter_settings(look_settings) -> dict:
    """Settings of a run of adapters, with stores that round nothing."""
    return {**look_settings, "adapter": "lora", "lora_rank": 4, "lora_alpha": 8.0}


def _new_stage(settings, base, passed, **changes):
    return KIND.new(make_settings({**settings, **changes}), base.config, passed, None, 1)


def _run(settings, folder, **changes):
    run = run_cascade(make_settings({**settings, "out": str(folder), **changes}))
    return run.path, json.loads((run.path / "results.json").read_text())


# --- what an untrained one equals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_cascade_is_the_base(adapter_settings, tmp_path, family):
    config_class, model_class, changes = FAMILIES[family]
    config = {**tiny_llama_config().to_dict(), **changes, "model_type": config_class.model_type}
    config["sliding_window"] = 32 if family == "mistral" else None
    model = model_class(config_class(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms too: zeros and ones would hide a mistake
            if "layers" in name and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = {**adapter_settings, "base": str(tmp_path / "base")}
    base, _, passed = passed_by_base(settings, tmp_path)
    stage, val = _new_stage(settings, base, passed).eval(), passed.stores["val"]
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
    stage = draw_updates(_new_stage(settings, base, passed), scale=0.2).eval()
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


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_leaves_the_updates_and_gets_better(adapter_settings, tmp_path, dtype):
    settings = {**adapter_settings, "shuffle": "off", "lora_rank": 16, "lr": 1e-2, "dtype": dtype, "hard_ratio": 1.0}
    run, results = _run({**settings, "store_dtype": "auto"}, tmp_path / "run", num_stages=1)
    (stage,) = results["stages"]
    assert stage["all_token_val_ppl"] < results["base"]["val_ppl"]
    tensors = load_file(run / "stages/1/model.safetensors")
    shape = json.loads((run / "config.json").read_text())["stages"][0]
    assert shape["lora"] == {"rank": 16, "alpha": 8.0, "targets": list(LORA_TARGETS)}
    parts = {
        name: "self_attn" if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) else "mlp" for name in LORA_TARGETS
    }
    names = {f"layers.{n}.{parts[t]}.{t}.lora_{ab}.weight" for n in range(LAYERS) for t in LORA_TARGETS for ab in "AB"}
    assert set(tensors) == names
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    count = sum(tensor.numel() for tensor in tensors.values())
    assert stage["added_parameters"] == stage["trainable_parameters"] == count
    assert results["final"]["total_parameters"] == results["base"]["parameters"] + count
    assert tensors["layers.1.mlp.down_proj.lora_A.weight"].shape == (16, 48)


def test_only_what_is_asked_for_is_updated(adapter_settings, tmp_path):
    asked = ["v_proj", "gate_proj"]
    run, _ = _run(adapter_settings, tmp_path / "run", lora_targets=asked, num_stages=1, epochs=1, accept="always")
    tensors = load_file(run / "stages/1/model.safetensors")
    assert {name.split(".")[3] for name in tensors} == set(asked)
    assert len(tensors) == LAYERS * 2 * 2


def test_training_leaves_the_base_s_layers_bit_for_bit(adapter_settings, tmp_path):
    base, _, passed = passed_by_base(adapter_settings, tmp_path)
    lent = {**passed.layers, "norm": passed.norm_D, "head": passed.head_VD}
    before = {name: tensor.clone() for name, tensor in lent.items()}
    stage = _new_stage(adapter_settings, base, passed)
    train = passed.stores["train"]
    tokens = SequenceTokens([train], hardest_of_store(train, 0.6).index_K)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    losses = []
    for _ in range(24):
        pack, label_K = tokens.batch(torch.arange(4), CPU)
        loss = nn.functional.cross_entropy(stage(pack)[1] @ stage.head.T, label_K)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {f"layers.{name}": tensor for name, tensor in passed.lent["layers"].state_dict().items()}
    after |= {"norm": passed.norm_D, "head": passed.head_VD}
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.grad is None for tensor in passed.lent["layers"].parameters())
    # One in memory, whoever uses it, and no part of the stage.
    another = _new_stage(adapter_settings, base, passed)
    frozen = [one.layers[0].self_attn.q_proj.frozen.weight for one in (stage, another)]
    assert frozen[0].data_ptr() == frozen[1].data_ptr()
    assert not passed.layers
    assert not any("norm" in name or "frozen" in name for name in stage.state_dict())


def test_stored_and_recomputed_keys_and_values_train_the_same(adapter_settings, tmp_path):
    runs = [_run(adapter_settings, tmp_path / kv, accept="always", kv=kv)[1] for kv in ("store", "recompute")]
    losses = [[(e["train_loss"], e["val_loss"]) for s in r["stages"] for e in s["epochs"]] for r in runs]
    assert len(losses[0]) == 4
    assert losses[1] == [pytest.approx(epoch, abs=1e-4) for epoch in losses[0]]
    assert runs[0]["final"]["all_token_val_ppl"] == pytest.approx(runs[1]["final"]["all_token_val_ppl"], rel=1e-4)


@pytest.mark.parametrize("more", [["--kv", "store"], ["--kv", "recompute"], ["--hard-ratio", "1"]], ids=" ".join)
def test_killed_and_resumed_it_is_the_run_nobody_disturbed(server, tiny_base, tmp_path, more):
    """In the base pass, in stage 1, between the stages and in stage 2."""
    more = ["--adapter", "lora", *more]
    answer = server.run(tmp_path / "whole", *small_run(tiny_base, tmp_path / "whole", "second-look", *more))
    assert answer["code"] == 0, answer["err"]
    operations, killed = answer["operations"], 0
    for part in (0.15, 0.4, 0.55, 0.8):
        command = small_run(tiny_base, tmp_path / "run", "second-look", *more)
        answer = server.run(tmp_path / "run", *command, die_at=max(1, int(part * operations / 2)))
        killed += answer["code"] == -9
    assert killed >= 3
    answer = server.run(tmp_path / "run", *command)
    assert (answer["code"], answer["err"]) == (0, "")
    assert differences(tmp_path / "whole/run", tmp_path / "run/run") == []
    assert epochs_told(tmp_path / "whole/run") == epochs_told(tmp_path / "run/run")


# --- every token enters -----------------------------------------------------------------------------------------------


def _layer_calls(monkeypatch) -> dict[str, list[int]]:
    """Tokens that go through each of the base's layers, by split."""
    calls: dict[str, list[int]] = {}
    real = base_pass_module._run_split

    def counted(model, sequences, folder, *args):
        rows = calls[folder.name] = [0] * len(model.model.layers)
        hooks = [
            layer.register_forward_hook(
                lambda _m, args, _out, n=n: rows.__setitem__(n, rows[n] + args[0].shape[:-1].numel())
            )
            for n, layer in enumerate(model.model.layers)
        ]
        store = real(model, sequences, folder, *args)
        for hook in hooks:
            hook.remove()
        return store

    monkeypatch.setattr(base_pass_module, "_run_split", counted)
    return calls


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("layers", [2, 3])
def test_the_base_is_not_run_over_training_text_from_the_stage_on(
    look_settings, tmp_path, monkeypatch, layers, adapter
):
    calls = _layer_calls(monkeypatch)
    settings = {**look_settings, "adapter": adapter, "layers_per_stage": layers, "hard_ratio": 1.0}
    _, _, passed = passed_by_base(settings, tmp_path, test_blocks=12)
    assert passed.all_enter
    assert calls["train"] == [40 * 32] * (3 - layers) + [0] * layers
    assert calls["val"] == calls["test"] == [12 * 32] * 3
    for split, store in passed.stores.items():
        assert "kv" not in store
        assert ("loss" in store) is (split != "train")
        assert store["score"].isnan().all() == (split == "train")
    selection = hardest_of_store(passed.stores["train"], 1.0)
    assert selection.threshold == EVERY_TOKEN
    assert torch.equal(selection.index_K, torch.arange(40 * 32))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_it_is_the_run_whose_base_pass_kept_keys_and_values(look_settings, tmp_path, monkeypatch, adapter):
    settings = {**look_settings, "adapter": adapter, "hard_ratio": 1.0, "accept": "always", "test_blocks": 12}
    one, results = _run(settings, tmp_path / "one")
    monkeypatch.setattr(base_pass_module, "_all_enter", lambda needs, sequences: False)
    monkeypatch.setattr("cascade_fast.planning.plan.make_plan", _as_if_labels_were_missing())
    other, kept = _run(settings, tmp_path / "other", cache_dir=str(tmp_path / "cache"), kv="store")
    for number in (1, 2):
        weights = [load_file(run / f"stages/{number}/model.safetensors") for run in (one, other)]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-6, msg=name)
    assert [s["threshold"] for s in results["stages"]] == [EVERY_TOKEN] * 2
    assert [s["exit_share"] for s in results["stages"]] == [s["exit_share"] for s in kept["stages"]]
    for field in ("all_token_val_ppl", "all_token_test_ppl", "base_test_ppl"):
        assert results["final"][field] == pytest.approx(kept["final"][field], rel=1e-6)
    assert results["base"]["val_ppl"] == kept["base"]["val_ppl"]
    assert results["final"]["exit_share"] == {"base": 0.0, "stage_1": 0.0, "stage_2": 1.0}


def _as_if_labels_were_missing():
    from cascade_fast.planning.plan import make_plan

    return lambda settings, base_config, device, disk_bytes, share: make_plan(
        settings, base_config, device, disk_bytes, 0.99
    )


def test_with_tokens_without_a_label_keys_and_values_are_kept(adapter_settings, tmp_path):
    rows = [{"q": text[:30], "a": text[30:60]} for text in english_texts(60, 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = {"train_blocks": None, "val_blocks": None, "train_tokens": 1200, "val_tokens": 300, "test_tokens": 300}
    settings = {
        **adapter_settings, **blocks, "dataset": str(tmp_path / "rows.jsonl"), "hard_ratio": 1.0, "seq_len": 64,
        "prompt_template": "{q}", "completion_template": "{a}",
    }  # fmt: skip
    _, _, passed = passed_by_base(settings, tmp_path)
    assert not passed.all_enter
    for store in passed.stores.values():
        assert "kv" in store
        assert 0 < len(store.labelled_index()) < len(store)
    train = passed.stores["train"]
    assert torch.equal(hardest_of_store(train, 1.0).index_K, train.labelled_index())
    _, results = _run(settings, tmp_path / "run", accept="always", num_stages=1)
    assert results["stages"][0]["train_hard"] == results["tokens"]["train"] == len(train.labelled_index())
    assert results["final"]["exit_share"]["stage_1"] == 1.0


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
    stage, train = _new_stage(settings, base, passed), passed.stores["train"]
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


@needs_bitsandbytes
def test_a_whole_run_in_4_bit(adapter_settings, nf4_base, tmp_path):
    settings = {**adapter_settings, "base": str(nf4_base), "base_quantization": "nf4", "lr": 1e-2, "shuffle": "off"}
    runs = [_run(settings, tmp_path / kv, kv=kv, accept="always") for kv in ("store", "recompute")]
    for run, results in runs:
        assert results["stages"][0]["all_token_val_ppl"] < results["base"]["val_ppl"]
        assert all(t.dtype == torch.float32 for t in load_tensors(run / "stages/2/model.safetensors")[0].values())
    ends = [[s["all_token_val_ppl"] for s in results["stages"]] for _, results in runs]
    assert ends[0] == pytest.approx(ends[1], rel=5e-3)
    assert find_base(make_settings(settings)).quantization == "nf4"


# --- the preset -------------------------------------------------------------------------------------------------------


def test_all_layers_are_as_many_as_the_base_has(adapter_settings, tmp_path):
    asked = {"layers_per_stage": "all", "hard_ratio": 1.0, "num_stages": 1, "epochs": 1}
    run, results = _run(adapter_settings, tmp_path / "run", **asked)
    assert results["settings"]["layers_per_stage"] == results["base"]["layers"] == 3
    assert results["final"]["merged"]["layers_per_token"] == 3
    before = (run / "results.json").read_bytes()
    again, _ = _run(adapter_settings, tmp_path / "run", **asked, resume="auto")
    assert again == run
    assert (run / "results.json").read_bytes() == before  # finished already: nothing is trained again
    with pytest.raises(InputError, match="layers_per_stage: -1; must be at least 1, or all"):
        make_settings({"layers_per_stage": -1})


def test_the_preset_lora_fits_any_base():
    settings = make_settings({"preset": "lora"})
    assert (settings.adapter, settings.hard_ratio, settings.num_stages) == ("lora", 1.0, 1)
    for layers in (2, 30):
        base = tiny_llama_config(num_hidden_layers=layers)
        assert with_layers(settings, base).layers_per_stage == layers
        KIND.check("base", base, with_layers(settings, base))
