"""The base in 4 bit for the base pass: what is quantised, what is not, and what the run remembers of it."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama_config
from transformers import LlamaForCausalLM

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import find_base, read_weights
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.model.measuring import measure
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.files import read_json
from cascade_fast.settings import make_settings
from cascade_fast.stages.kind import base_needs

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base_folder(request, tmp_path_factory):
    """A random Llama whose matrices are whole numbers of 64-weight blocks."""
    torch.manual_seed(0)
    config = tiny_llama_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=request.param)
    folder = tmp_path_factory.mktemp("nf4") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base_folder, tiny_settings):
    return {**tiny_settings, "base": str(base_folder), "base_quantization": "nf4", "num_stages": 1, "epochs": 1}


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_4_bit_and_embeddings_norms_and_head_are_not(settings, dtype):
    base = find_base(make_settings(settings))
    model = base.load(CPU, dtype)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.weight.dtype == torch.uint8
            assert module.weight.quant_state.quant_type == "nf4"
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight):
        assert weight.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == base.config.tie_word_embeddings
    assert model.dtype == dtype


@needs_bitsandbytes
def test_the_4_bit_base_is_near_the_one_it_was_made_from(settings):
    ids = torch.arange(32)[None]
    exact = find_base(make_settings({**settings, "base_quantization": "none"})).load(CPU, torch.float32)
    quantised = find_base(make_settings(settings)).load(CPU, torch.float32)
    with torch.inference_mode():
        a, b = exact(ids).logits, quantised(ids).logits
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


@needs_bitsandbytes
def test_the_fingerprint_of_the_base_pass_tells_the_two_apart_and_the_head_is_shared_unquantised(settings, tmp_path):
    passes = {}
    for quantization in ("none", "nf4"):
        asked = make_settings({**settings, "base_quantization": quantization})
        base = find_base(asked)
        blocks = load_sequences(asked, base.tokenizer())
        passes[quantization] = base_pass(base, blocks, asked, base_needs(asked), Compute(CPU, torch.float32), tmp_path)
    plain, nf4 = passes["none"], passes["nf4"]
    assert not nf4.reused
    assert nf4.stores["train"].meta["fingerprint"] != plain.stores["train"].meta["fingerprint"]
    assert not torch.equal(plain.stores["train"].hidden, nf4.stores["train"].hidden)
    assert torch.equal(plain.head_VD, nf4.head_VD)
    assert nf4.parameters == plain.parameters


@needs_bitsandbytes
def test_a_whole_run_on_a_4_bit_base(settings, tmp_path):
    run = run_cascade(make_settings({**settings, "accept": "always", "out": str(tmp_path / "run")}))
    results = json.loads((run.path / "results.json").read_text())
    assert results["settings"]["base_quantization"] == "nf4"
    assert json.loads((run.path / "config.json").read_text())["base"]["quantization"] == "nf4"
    assert results["stages"][0]["epochs"]
    # The folder loads as a model on that base, whose numbers are the run's.
    model = CascadeForCausalLM.from_pretrained(run.path)
    assert model.base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    settings = make_settings(results["settings"])
    sequences = load_sequences(settings, find_base(settings).tokenizer()).splits["val"]
    closed, trained = (measure(model, sequences, thresholds) for thresholds in ([-math.inf], model.config.thresholds))
    assert closed.perplexity == pytest.approx(results["base"]["val_ppl"], rel=1e-5)
    assert trained.perplexity == pytest.approx(results["stages"][0]["all_token_val_ppl"], rel=1e-5)
    with pytest.raises(InputError, match=r"self_contained: True; .* in 4 bit \(base_quantization nf4\)"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    model.save_pretrained(tmp_path / "thin", self_contained=False)
    ids = sequences.blocks()[:2, :-1].long()
    assert torch.equal(CascadeForCausalLM.from_pretrained(tmp_path / "thin")(ids).logits, model(ids).logits)
    card = (tmp_path / "thin" / "README.md").read_text()
    assert "3 layers, in 4 bit (nf4)" in card
    assert f"{results['final']['total_parameters']:,}" in card


@needs_bitsandbytes
def test_a_run_of_before_remembers_its_quantisation_in_its_settings(settings, tmp_path, monkeypatch):
    run = run_cascade(make_settings({**settings, "accept": "always", "out": str(tmp_path / "run")}))
    config = read_json(run.path / "config.json")  # without its checksum
    del config["base"]["quantization"]
    (run.path / "config.json").write_text(json.dumps(config))
    model = CascadeForCausalLM.from_pretrained(run.path)
    assert model.base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(InputError, match="base_quantization: 'nf4'; needs bitsandbytes: pip install bitsandbytes"):
        CascadeForCausalLM.from_pretrained(run.path)


def test_a_missing_bitsandbytes_is_said_before_any_work(settings, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(InputError, match="base_quantization: 'nf4'; needs bitsandbytes: pip install bitsandbytes"):
        find_base(make_settings(settings))


def test_weights_of_several_files_are_read_and_converted(tmp_path):
    model = LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected = model.state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        weights = read_weights(tmp_path, dtype)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert weight.dtype == dtype
            assert torch.equal(weight, expected[name].to(dtype))
