"""A whole run of second looks, and what it refuses."""

import json

import pytest
import torch
from conftest import tiny_llama_config
from safetensors.torch import load_file
from second_look_cases import HOW, LAYERS, copied_stage, passed_by_base
from transformers import MistralConfig

from cascade_fast.base.model import find_base
from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits
from cascade_fast.stages.kind import find_base_for_stages
from cascade_fast.stages.second_look import KIND, SecondLookConfig
from cascade_fast.training import trainer


def _run(settings, folder, **changes):
    run = run_cascade(make_settings({**settings, "out": str(folder), **changes}))
    return run, json.loads((folder / "results.json").read_text())


def test_a_run_saves_what_it_measured(look_settings, tmp_path):
    look_settings = {**look_settings, "shuffle": "off"}  # splits on which so small a model gets better
    run, results = _run(look_settings, tmp_path / "run", accept="always", hard_ratio=0.5)
    first, second = results["stages"]
    assert first["all_token_val_ppl"] < results["base"]["val_ppl"]
    assert second["train_total"] == first["train_hard"]
    layer = find_base(make_settings(look_settings)).config
    assert first["added_parameters"] == LAYERS * _layer_parameters(layer) + layer.hidden_size
    cascade = json.loads((run.path / "config.json").read_text())
    assert [stage["kind"] for stage in cascade["stages"]] == ["second-look"] * 2
    base, _, passed = passed_by_base(look_settings, tmp_path)
    shape = SecondLookConfig.from_base(base.config, layers=LAYERS)
    entries = [
        ExitStage.load(run.path / f"stages/{n}", shape, cascade["stages"][n - 1]["threshold"], passed.head_VD)
        for n in (1, 2)
    ]
    evaluation = evaluate_exits(entries, passed.stores["val"], **HOW)
    assert evaluation.perplexity == pytest.approx(results["final"]["all_token_val_ppl"], rel=1e-6)
    assert evaluation.shares(2) == pytest.approx(second["exit_share"])
    assert (run.path / "stages/2/model.safetensors").is_file()
    assert not (run.path / "hidden").exists()


def _layer_parameters(config) -> int:
    size, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return size * head * (2 * heads + 2 * groups) + 3 * size * inner + 2 * size


def test_stage_two_starts_as_stage_one(look_settings, tmp_path):
    """With a learning rate of nearly nothing stage 2 stays what it was copied from."""
    run, results = _run(look_settings, tmp_path / "run", accept="always", lr=1e-12, weight_decay=0.0, epochs=1)
    one, two = (load_file(run.path / f"stages/{n}/model.safetensors") for n in (1, 2))
    assert len(results["stages"]) == 2
    assert all(torch.allclose(one[name], two[name], atol=1e-8) for name in one)
    assert results["final"]["all_token_val_ppl"] == pytest.approx(results["base"]["val_ppl"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_sixteen_bit_too(look_settings, tmp_path, dtype):
    _, results = _run(
        look_settings, tmp_path / "run", dtype=dtype, store_dtype="auto", num_stages=1, micro_batch_tokens=32
    )
    (stage,) = results["stages"]
    assert stage["all_token_val_ppl"] < results["base"]["val_ppl"]
    assert all(epoch["tokens_per_second"] > 0 for epoch in stage["epochs"])


@pytest.mark.parametrize(("kind", "trims"), [("second-look", True), ("append", False)])
def test_memory_goes_back_to_the_system_within_an_epoch(look_settings, tmp_path, monkeypatch, kind, trims):
    """Packs differ in size, and what one has freed seldom fits the next; tokens of an appended stage's batch do not."""
    monkeypatch.setattr(trainer, "TRIM_STEPS", 2)
    trimmed = []
    monkeypatch.setattr(trainer, "trim_host_memory", lambda: trimmed.append(True))
    run, _ = _run(look_settings, tmp_path / "run", stage_kind=kind, num_stages=1, epochs=1, batch_tokens=32)
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = max(event["step"] for event in events if event["event"] == "steps")
    assert steps >= 4
    assert len(trimmed) == (steps // 2 + 1 if trims else 0)  # and once before validation


def test_micro_batches_add_up(look_settings, tmp_path):
    """The same run in parts: the same loss to rounding."""
    runs = [
        _run(look_settings, tmp_path / str(part), num_stages=1, micro_batch_tokens=part)[1]["stages"][0]
        for part in (None, 16)
    ]
    losses = [[(e["train_loss"], e["val_loss"]) for e in stage["epochs"]] for stage in runs]
    assert losses[1] == [pytest.approx(epoch, abs=1e-4) for epoch in losses[0]]


def test_recomputed_keys_and_values_are_the_base_s(look_settings, tmp_path):
    base, _, passed = passed_by_base(look_settings, tmp_path)
    val = passed.stores["val"]
    with torch.no_grad():
        kv = copied_stage(base, passed).keys_and_values(val.hidden.unflatten(0, (-1, 32)))
    torch.testing.assert_close(kv.flatten(0, 1), val["kv"], rtol=1e-5, atol=1e-5)


def test_a_run_that_recomputes_is_the_run_that_stores(look_settings, tmp_path):
    runs = [_run(look_settings, tmp_path / kv, accept="always", kv=kv) for kv in ("store", "recompute")]
    losses = [[(e["train_loss"], e["val_loss"]) for s in r["stages"] for e in s["epochs"]] for _, r in runs]
    assert losses[1] == [pytest.approx(epoch, abs=1e-4) for epoch in losses[0]]
    finals = [results["final"] for _, results in runs]
    assert finals[1]["all_token_test_ppl"] == pytest.approx(finals[0]["all_token_test_ppl"], rel=1e-4)
    assert finals[1]["stages_kept"] == 2
    _, _, passed = passed_by_base(look_settings, tmp_path, kv="recompute")
    assert "kv" not in passed.stores["train"]


def test_a_run_settles_how_it_gets_keys_and_values_once(look_settings, tmp_path, capsys):
    """The plan finds it out, says why, and a resumed run does not ask again."""
    _, results = _run(look_settings, tmp_path / "run", num_stages=1)
    assert "plan: kv: " in capsys.readouterr().out
    assert results["settings"]["kv"] in ("store", "recompute")
    assert results["memory"]["planned"]["peak_bytes"] > 0
    record = read_json(tmp_path / "run" / "config.json")
    assert record["kv"] == results["settings"]["kv"]
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed at the end
    other = {"store": "recompute", "recompute": "store"}[record["kv"]]
    write_json(tmp_path / "run" / "config.json", {**record, "kv": other})
    _, resumed = _run(look_settings, tmp_path / "run", num_stages=1, resume="auto")
    assert resumed["settings"]["kv"] == other


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(tiny_settings):
    look = {**tiny_settings, "stage_kind": "second-look"}
    with pytest.raises(InputError, match="init: 'random'; a second look starts as the base's own layers"):
        make_settings({**look, "init": "random"})
    with pytest.raises(InputError, match="kv: 'recompute'; stages of kind append use none"):
        make_settings({**tiny_settings, "kv": "recompute"})
    with pytest.raises(InputError, match="init: 'random'"):
        make_settings({**look, "preset": "seed"})
    with pytest.raises(InputError, match="head: shared"):
        make_settings({**look, "head": "own"})
    with pytest.raises(InputError, match=r"layers_per_stage: 4; .* which has 3"):
        find_base_for_stages(make_settings({**look, "layers_per_stage": 4}))
    find_base_for_stages(make_settings({**look, "layers_per_stage": 3}))


def test_bases_it_cannot_copy_are_refused():
    shape = {k: v for k, v in tiny_llama_config().to_dict().items() if k not in ("model_type", "rope_parameters")}
    settings, check = make_settings({"preset": "second-look", "layers_per_stage": 2, "seq_len": 32}), KIND.check
    with pytest.raises(InputError, match=r"seq_len: 32; 'x' attends to the last 8 tokens only.*must be at most 8"):
        check("x", MistralConfig(**{**shape, "sliding_window": 8}), settings)
    check("x", MistralConfig(**{**shape, "sliding_window": 32}), settings)
    dynamic = tiny_llama_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(InputError, match="rotary positions of type dynamic, must be one of default, linear"):
        check("x", dynamic, settings)
