"""Runs with LoRA adapters: what they learn and leave alone, and what they equal."""

import json

import pytest
import torch
from conftest import english_texts
from run_faults import differences, epochs_told, small_run
from safetensors.torch import load_file
from second_look_cases import CPU, LAYERS, adapter_stage, passed_by_base
from test_quantization import needs_bitsandbytes
from torch import nn

from cascade_fast.base import base_pass as base_pass_module
from cascade_fast.base.model import find_base
from cascade_fast.base.split_store import SplitStore
from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import load_tensors
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.tokens import SequenceTokens


def _run(settings, folder, **changes):
    run = run_cascade(make_settings({**settings, "out": str(folder), **changes}))
    return run.path, json.loads((run.path / "results.json").read_text())


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
    stage = adapter_stage(adapter_settings, base, passed)
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
    another = adapter_stage(adapter_settings, base, passed)
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
    real = SplitStore.filled

    def counted(self, model, progress):
        rows = calls[self.folder.name] = [0] * len(model.model.layers)
        hooks = [
            layer.register_forward_hook(
                lambda _m, args, _out, n=n: rows.__setitem__(n, rows[n] + args[0].shape[:-1].numel())
            )
            for n, layer in enumerate(model.model.layers)
        ]
        store = real(self, model, progress)
        for hook in hooks:
            hook.remove()
        return store

    monkeypatch.setattr(SplitStore, "filled", counted)
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

    return lambda settings, base_config, device, disk_bytes, _share, gpus: make_plan(
        settings, base_config, device, disk_bytes, 0.99, gpus
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


# --- in 4 bit ---------------------------------------------------------------------------------------------------------


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


# --- all layers -------------------------------------------------------------------------------------------------------


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
