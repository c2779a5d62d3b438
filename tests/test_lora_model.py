"""Adapters inside ``CascadeForCausalLM``: the base's layers are there once, in memory and in files."""

import copy
import json
import math

import pytest
import torch
from conftest import _settings, text_ids
from second_look_cases import LAYERS, draw_updates
from test_quantization import needs_bitsandbytes
from transformers import AutoModelForCausalLM

from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.measuring import measure
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import read_json
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.second_look import SecondLookConfig

LORA = {"rank": 3, "alpha": 6.0, "targets": list(LORA_TARGETS)}
CLOSED, OPEN = [-math.inf] * 2, [EVERY_TOKEN] * 2
HOW = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).requires_grad_(False)


def _cascade(base, *, updates=0.1, **lora) -> CascadeForCausalLM:
    """``base`` with two looks with adapters; some of the tokens leave at each exit."""
    shape = SecondLookConfig.from_base(base.config, layers=LAYERS, lora={**LORA, **lora})
    config = CascadeConfig(
        base_config=base.config,
        base={"name": "nowhere", "fingerprint": "0" * 64},
        criterion="entropy",
        stages=[{**shape.to_dict(), "threshold": 0.0} for _ in range(2)],
    )
    model = CascadeForCausalLM(config).eval()
    model.base.load_state_dict(base.state_dict())
    for number, stage in enumerate(model.stages):
        draw_updates(stage, scale=updates, seed=number)
    for number in range(2):
        thresholds = [*model.config.thresholds[:number], *[math.inf] * (2 - number)]
        scores = model(text_ids(), thresholds=thresholds, output_exits=True).scores[..., number]
        model.config.stages[number]["threshold"] = scores[~scores.isnan()].median().item()
    return model


@pytest.fixture
def model(base):
    return _cascade(base)


def _merged(base, stage):
    """transformers' model with a stage's updates added to its weights."""
    merged, lora = copy.deepcopy(base), stage.config.lora
    tensors = stage.state_dict()
    for name in tensors:
        if "lora_A" in name:
            _, number, rest = name.split(".", 2)
            where = f"model.layers.{int(number) + stage.config.entry_layer}.{rest.replace('lora_A.', '')}"
            update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * (lora["alpha"] / lora["rank"])
            with torch.no_grad():
                merged.get_parameter(where).add_(update)
    return merged


# --- what it equals ---------------------------------------------------------------------------------------------------


def test_closed_it_is_the_base_exactly_and_open_the_merged_model(base, model):
    ids = text_ids()
    assert torch.equal(model(ids, thresholds=CLOSED).logits, base(ids).logits)
    output = model(ids, thresholds=OPEN, output_exits=True)
    assert (output.exits == 2).all()
    torch.testing.assert_close(output.logits, _merged(base, model.stages[1])(ids).logits, rtol=1e-4, atol=1e-4)
    first = model(ids, thresholds=[EVERY_TOKEN, -math.inf]).logits
    torch.testing.assert_close(first, _merged(base, model.stages[0])(ids).logits, rtol=1e-4, atol=1e-4)
    assert (output.logits - base(ids).logits).abs().max() > 0.1
    assert model(ids, output_exits=True).exits.unique().tolist() == [0, 1, 2]


def test_without_updates_it_is_the_base(base):
    ids, model = text_ids(), _cascade(base, updates=0.0)
    torch.testing.assert_close(model(ids, thresholds=OPEN).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_is_generation_without(model):
    model.generation_config.eos_token_id = 299  # never comes
    ids = text_ids(2)
    how = {**HOW, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, use_cache=False))


def test_gradients_flow_through_both_to_what_learns(base):
    model, ids = _cascade(base), text_ids()
    model.base.requires_grad_(False)
    model(ids, labels=ids, thresholds=OPEN, use_cache=False).loss.backward()
    last = dict(model.stages[1].named_parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in last.values())
    assert all(p.grad is None for p in model.base.parameters())


# --- the base's layers are there once ---------------------------------------------------------------------------------


def test_the_layers_are_the_base_s_own(model):
    for stage in model.stages:
        entry = stage.config.entry_layer
        for mine, theirs in zip(stage.layers, model.base.model.layers[entry:], strict=True):
            assert mine.self_attn.q_proj.frozen is theirs.self_attn.q_proj
            assert mine.mlp.down_proj.frozen is theirs.mlp.down_proj
            assert mine.input_layernorm.weight is theirs.input_layernorm.weight
        assert stage.norm.weight is model.base.model.norm.weight
    names = set(model.state_dict())
    assert {n for n in names if n.startswith("base.")} == {f"base.{n}" for n in model.base.state_dict()}
    of_stages = names - {n for n in names if n.startswith("base.")}
    assert len(of_stages) == 2 * LAYERS * len(LORA_TARGETS) * 2
    assert all("lora_" in name for name in of_stages)
    theirs, mine = (sum(p.numel() for p in m.parameters()) for m in (model.base, model))
    assert mine - theirs == sum(stage.parameter_count() for stage in model.stages)


def test_a_copy_uses_its_own_base(model):
    ids = text_ids()
    expected = model(ids).logits
    copied = copy.deepcopy(model)
    assert copied.stages[0].layers[0].mlp.up_proj.frozen is copied.base.model.layers[1].mlp.up_proj
    with torch.no_grad():
        for parameter in copied.base.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, expected)


def test_moved_to_another_dtype_it_still_is_one(model):
    ids = text_ids()
    expected = model(ids, thresholds=OPEN).logits
    model.to(torch.bfloat16)
    assert model.stages[0].layers[0].mlp.up_proj.frozen.weight.dtype == torch.bfloat16
    got = model(ids, thresholds=OPEN).logits.float()
    assert (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("by", [CascadeForCausalLM, AutoModelForCausalLM])
def test_a_self_contained_folder_loads_as_it_was(model, tmp_path, by):
    model.save_pretrained(tmp_path)
    ids = text_ids()
    loaded = by.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.stages[1].layers[0].mlp.up_proj.frozen is loaded.base.model.layers[1].mlp.up_proj
    tensors = sum(t.numel() for t in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * tensors + 20_000
    assert json.loads((tmp_path / "config.json").read_text())["stages"][0]["lora"] == LORA


# --- a run's folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_base, tiny_data, tmp_path_factory):
    return _finished(tiny_base, tiny_data, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def nf4_run(nf4_base, tiny_data, tmp_path_factory):
    return _finished(nf4_base, tiny_data, tmp_path_factory.mktemp("nf4"), base_quantization="nf4")


def _finished(base, data, folder, **changes):
    settings = {
        **_settings(base, data), "stage_kind": "second-look", "adapter": "lora", "lora_rank": 3, "lr": 1e-2,
        "out": str(folder / "run"), "cache_dir": str(folder / "cache"), "store_dtype": "float32", "accept": "always",
    }  # fmt: skip
    return run_cascade(make_settings({**settings, **changes})).path


def _measures_what_the_run_did(run, model, rel):
    results = json.loads((run / "results.json").read_text())
    settings = make_settings(results["settings"])
    sequences = load_sequences(settings, find_base(settings).tokenizer()).splits["val"]
    closed, trained = (measure(model, sequences, thresholds) for thresholds in (CLOSED, model.config.thresholds))
    assert closed.perplexity == pytest.approx(results["base"]["val_ppl"], rel=rel)
    assert trained.perplexity == pytest.approx(results["final"]["all_token_val_ppl"], rel=rel)
    return sequences.blocks()[:2, :-1].long()


def test_a_run_s_folder_loads_as_the_cascade_it_measured(run, tmp_path):
    model = CascadeForCausalLM.from_pretrained(run)
    ids = _measures_what_the_run_did(run, model, rel=1e-5)
    assert model.stages[0].norm.weight is model.base.model.norm.weight
    for self_contained in (True, False):
        folder = tmp_path / str(self_contained)
        model.save_pretrained(folder, self_contained=self_contained)
        assert torch.equal(CascadeForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)
    assert "LoRA adapters of its last 2 layers" in (tmp_path / "False/README.md").read_text()
    size = (tmp_path / "False/stages/1/model.safetensors").stat().st_size
    assert size < 4 * model.stages[0].parameter_count() + 8_000


@needs_bitsandbytes
def test_in_4_bit_too(nf4_run, tmp_path):
    model = CascadeForCausalLM.from_pretrained(nf4_run)
    assert model.base.model.layers[1].mlp.up_proj.weight.dtype == torch.uint8
    assert model.stages[0].layers[0].mlp.up_proj.frozen is model.base.model.layers[1].mlp.up_proj
    ids = _measures_what_the_run_did(nf4_run, model, rel=2e-2)
    model.generation_config.eos_token_id = 299
    prompt = ids[:1, :6]
    generated = model.generate(prompt, **HOW, attention_mask=torch.ones_like(prompt))
    assert generated.shape == (1, 14)
    with pytest.raises(InputError, match=r"self_contained: True; .* in 4 bit"):
        model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "thin", self_contained=False)
    loaded = CascadeForCausalLM.from_pretrained(tmp_path / "thin")
    assert torch.equal(loaded(ids).logits, CascadeForCausalLM.from_pretrained(nf4_run)(ids).logits)
    files = {p.name for p in (tmp_path / "thin").rglob("*.safetensors")}
    assert files == {"model.safetensors"}


# --- a damaged configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("x", "lora"),
        ([], "lora"),
        ({}, "lora: 'rank' is missing|lora"),
        ({**LORA, "rank": 0}, "rank 0"),
        ({**LORA, "rank": 2.5}, "rank"),
        ({**LORA, "rank": True}, "rank"),
        ({**LORA, "alpha": 0.0}, "alpha 0"),
        ({**LORA, "alpha": "x"}, "alpha"),
        ({**LORA, "targets": "q_proj"}, "targets"),
        ({**LORA, "targets": ["lm_head"]}, "targets: 'lm_head'; must be some of"),
        ({**LORA, "targets": [["q_proj"]]}, "targets"),
        ({**LORA, "targets": [{}]}, "targets"),
        ({**LORA, "more": 1}, "more"),
    ],
    ids=str,
)
def test_a_damaged_entry_is_named(run, lora, said, tmp_path):
    config = read_json(run / "config.json")  # without its checksum
    config["stages"][0]["lora"] = config["stages"][1]["lora"] = lora
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said) as told:
        CascadeForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"entry_layer": 0},
        {"lora": None},  # a copy, then, whose weights are not there
        {"lora": {**LORA, "rank": 4}},
        {"lora": {**LORA, "rank": 10**9}},
        {"lora": {**LORA, "targets": ["q_proj"]}},
    ],
    ids=str,
)
def test_an_entry_that_is_another_stage_s_does_not_load(run, changes, tmp_path):
    config = read_json(run / "config.json")
    for stage in config["stages"]:
        stage.update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "stages").symlink_to(run / "stages")
    with pytest.raises(InputError):
        CascadeForCausalLM.from_pretrained(tmp_path)
