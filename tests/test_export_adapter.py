"""Second looks with LoRA updates, merged or as PEFT's adapter: the logits of the cascade with open thresholds."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import text_ids
from export_cases import (
    CASES,
    LAYERS,
    LORA,
    check_close,
    open_logits,
    plain_logits,
    random_base,
    run_export,
    second_look_run,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cascade_fast.model import export
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import load_tensors
from cascade_fast.settings import LORA_TARGETS, make_settings

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def base(tmp_path) -> Path:
    return random_base(tmp_path / "base", "llama")


@pytest.fixture
def adapted(base, tmp_path) -> Path:
    """A cascade whose stage is an adapter."""
    return second_look_run(base, tmp_path / "adapted", lora=LORA)


@pytest.mark.parametrize("family", CASES)
def test_updates_are_merged(family, tmp_path):
    base = random_base(tmp_path / "base", family)
    cascade, ids = second_look_run(base, tmp_path / "run", lora=LORA), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    expected = open_logits(cascade, ids)
    check_close(plain_logits(tmp_path / "merged", ids), expected)
    assert (expected - plain_logits(base, ids)).abs().max() > 0.1


def test_updates_are_added_in_float32_and_rounded_once():
    name = "model.layers.3.mlp.up_proj.weight"
    base = {name: torch.randn(48, 64).bfloat16(), "model.norm.weight": torch.randn(64).bfloat16()}
    a, b = torch.randn(2, 64), torch.randn(48, 2)
    stage = {"layers.0.mlp.up_proj.lora_A.weight": a, "layers.0.mlp.up_proj.lora_B.weight": b}
    lora = {"rank": 2, "alpha": 1.0, "targets": ["up_proj"]}
    merged = export.merged_weights(base, stage, layers=range(3, 4), lora=lora, dtype=torch.bfloat16)
    expected = (base[name].double() + (b.double() @ a.double()) * 0.5).bfloat16()
    assert (merged[name] != expected).float().mean() < 0.005  # on the edge between two values at most
    rounded_often = base[name] + (b.bfloat16() @ a.bfloat16()) * 0.5
    assert (rounded_often != expected).float().mean() > 0.1
    assert merged["model.norm.weight"] is base["model.norm.weight"]


@needs_peft
@pytest.mark.parametrize(
    ("family", "layers", "targets"),
    [
        *((family, LAYERS, [*LORA_TARGETS]) for family in CASES),
        ("llama", 3, ["q_proj", "v_proj"]),
        ("qwen3", 1, ["up_proj"]),
    ],
)
def test_peft_loads_the_adapter(family, layers, targets, tmp_path, recwarn):
    from peft import AutoPeftModelForCausalLM, PeftModel

    base = random_base(tmp_path / "base", family)
    lora = {**LORA, "targets": targets}
    cascade, ids = second_look_run(base, tmp_path / "run", layers=layers, lora=lora), text_ids()
    lines, expected = export.export(str(cascade), tmp_path / "adapter", format="peft"), open_logits(cascade, ids)
    found = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    assert not [w for w in recwarn if "adapter" in str(w.message).lower() or "keys" in str(w.message).lower()]
    trained = {n for n, _ in found.named_parameters() if "lora_" in n}
    assert len(trained) == 2 * layers * len(targets)
    check_close(found(ids).logits, expected)
    check_close(found.merge_and_unload()(ids).logits, expected)
    check_close(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(ids).logits, expected
    )
    assert lines[-1] == (
        "note: adapter_config.json names the base's folder on this machine: change it before you share it"
    )
    assert lines[0].startswith(
        f"wrote {tmp_path / 'adapter'}: LoRA of rank 4 on {layers * len(targets)} linear layers,"
    )
    scope = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    check_close(eval(lines[2].removeprefix("load it: "), scope)(ids).logits, expected)


def test_what_an_adapter_folder_holds(base, adapted, tmp_path):
    """Read without PEFT: names and fields are its own."""
    export.export(str(adapted), tmp_path / "adapter", format="peft")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "revision": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(LORA_TARGETS),
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stage = load_tensors(adapted / "stages/1/model.safetensors")[0]
    assert len(tensors) == len(stage) == 2 * LAYERS * len(LORA_TARGETS)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    assert torch.equal(tensors[name], stage["layers.1.self_attn.q_proj.lora_A.weight"])
    card = (tmp_path / "adapter" / "README.md").read_text()
    metadata = yaml.safe_load(re.findall(r"\A---\n(.*?)\n---\n", card, re.DOTALL)[0])
    assert metadata["library_name"] == "peft"
    assert str(tmp_path) not in card
    assert "| rank, alpha | 4, 6 |" in card


def test_an_adapter_of_a_hub_model_names_it_with_its_revision(base, tmp_path):
    cascade = second_look_run(base, tmp_path / "run", lora={**LORA, "alpha": 6.5})
    source = export.Source.find(str(cascade), "peft", None)
    source.base.__dict__.update(source="someone/model", revision="abc")
    source.config.base.update(source="someone/model", revision="abc")
    lines = export._export_adapter(source, tmp_path / "adapter", torch.bfloat16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/model", "abc")
    assert config["lora_alpha"] == 6.5
    assert len(lines) == 3
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: someone/model\nbase_model_relation: adapter\n" in card
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _trained_on_4_bit(cascade: Path) -> None:
    config = json.loads((cascade / "config.json").read_text())
    config["base"]["quantization"] = "nf4"
    (cascade / "config.json").write_text(json.dumps(config))


def test_an_adapter_trained_on_4_bit(adapted, tmp_path, capsys, monkeypatch):
    """It is written where nothing can be loaded in 4 bit."""
    _trained_on_4_bit(adapted)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    code, out, err = run_export(capsys, adapted, "--to", tmp_path / "adapter", "--format", "peft")
    assert (code, err) == (0, "")
    assert "note: it was trained on the base in 4 bit (nf4): load the base so" in out
    assert 'bnb_4bit_quant_type="nf4"' in (tmp_path / "adapter" / "README.md").read_text()
    code, _, err = run_export(capsys, adapted, "--to", tmp_path / "merged")
    assert code == 2
    assert err.startswith("error: format: 'merged'; its stage was trained on a base in 4 bit (nf4): ")
    assert "Use --format peft" in err
    assert not (tmp_path / "merged").exists()


@needs_peft
def test_peft_on_4_bit_is_the_cascade_on_4_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    # bitsandbytes' kernels for the CPU want rows of whole blocks of 64.
    base = random_base(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    adapted, ids = second_look_run(base, tmp_path / "adapted", lora=LORA), text_ids()
    _trained_on_4_bit(adapted)
    expected = open_logits(adapted, ids)
    export.export(str(adapted), tmp_path / "adapter", format="peft")
    in_4_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=in_4_bit)
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # its products on the CPU are in bfloat16
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other = PeftModel.from_pretrained(whole, tmp_path / "adapter")(ids).logits
    assert (other - expected).abs().max() > 5e-2  # why nothing is merged into the base's own weights


@needs_peft
def test_a_trained_adapter_is_exported_both_ways(look_settings, tmp_path, capsys):
    from peft import PeftModel

    from cascade_fast.cascade import run_cascade

    asked = {**look_settings, "adapter": "lora", "num_stages": 1, "accept": "always", "hard_ratio": 1.0, "lr": 3e-2}
    with torch.enable_grad():
        run = run_cascade(make_settings({**asked, "test_blocks": 12, "out": str(tmp_path / "run")})).path
    ids = text_ids()
    expected = open_logits(run, ids)
    plain = AutoModelForCausalLM.from_pretrained(look_settings["base"], dtype=torch.float32)
    assert (plain(ids).logits - expected).abs().max() > 0.05  # it has learnt something
    for form in ("merged", "peft"):
        assert run_export(capsys, run, "--to", tmp_path / form, "--format", form)[0] == 0
        card = (tmp_path / form / "README.md").read_text()
        assert "## Measured" in card  # every token entered in training, too
    check_close(plain_logits(tmp_path / "merged", ids), expected)
    check_close(PeftModel.from_pretrained(plain, tmp_path / "peft")(ids).logits, expected)


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_a_whole_cascade_with_an_adapter(base, adapted, tmp_path, capsys, format):
    """A merged model needs nothing else; an adapter has to name its base."""
    CascadeForCausalLM.from_pretrained(adapted).save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    expected, ids = [export.export(str(adapted), tmp_path / "one", format=format)], text_ids()
    expected = open_logits(adapted, ids)
    base.rename(tmp_path / "moved")
    code, _, err = run_export(capsys, tmp_path / "whole", "--to", tmp_path / "two", "--format", format)
    if format == "peft":
        assert (code, "If it lies elsewhere now, pass base_path" in err) == (2, True)
        again = ["--to", tmp_path / "two", "--format", format, "--base-path", tmp_path / "moved"]
        assert run_export(capsys, tmp_path / "whole", *again)[0] == 0
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    else:
        check_close(plain_logits(tmp_path / "two", ids), expected)
