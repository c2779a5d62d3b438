"""One second look as a plain model or a LoRA adapter: the logits of the cascade with open thresholds, without us."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_tokenizer, text_ids, tiny_llama_config
from safetensors.torch import load_file, save_file
from test_stage import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cascade_fast import export as command
from cascade_fast.base.model import find_base
from cascade_fast.model import export
from cascade_fast.model.configuration import CascadeConfig, cascade_config
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import DamagedFile, DiskFull, load_tensors, save_tensors
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.settings import LORA_TARGETS, make_settings
from cascade_fast.stages.exits import ExitStage
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage

LAYERS = 2
ENTRY = 1  # of the bases' three layers
LORA = {"rank": 4, "alpha": 6.0, "targets": [*LORA_TARGETS]}
CASES = {**FAMILIES, "llama-untied": (*FAMILIES["llama"][:2], {"tie_word_embeddings": False})}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def _base(folder: Path, family: str, dtype=torch.float32, **more) -> Path:
    """A random model of three layers, biases and norms too, with a tokenizer. ``more``: of its configuration."""
    config_class, model_class, changes = CASES[family]
    fields = {**tiny_llama_config().to_dict(), **changes, **more, "model_type": config_class.model_type}
    if "sliding_window" in changes:
        fields["sliding_window"] = 64  # longer than the text: a second look has none
    model = model_class(config_class(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=0, temperature=0.5, do_sample=True).save_pretrained(folder)
    return folder


def _cascade(
    base_folder: Path, folder: Path, *, layers: int = LAYERS, threshold: float = 3.0, lora: dict | None = None
) -> Path:
    """What a run leaves whose stage is a copy of the base's last ``layers`` layers, and noise; or has updates of them,
    all of it noise."""
    base = find_base(make_settings({"base": str(base_folder), "seq_len": 2}))
    weights = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).state_dict()
    shape = SecondLookConfig.from_base(base.config, layers=layers, lora=lora)
    stage = SecondLookStage(shape, head_VD=None)
    for name, parameter in stage.named_parameters():
        if lora is None:
            parameter.copy_(weights[export.name_in_base(name, shape.entry_layer)] + 0.05 * torch.randn(parameter.shape))
        else:
            parameter.normal_(std=0.3)
    kept = [ExitStage(stage, threshold)]
    kept[0].save(folder / "stages" / "1")
    settings = {"base": str(base_folder), "out": str(folder), "dataset": "texts", "hard_ratio": 0.6}
    measured = {"test": {"tokens": 10, "base_ppl": 4.0, "cascade_ppl": 3.0}}
    config = cascade_config(base, kept, criterion="entropy", settings=settings, measured=measured, dtype="float32")
    config.save_pretrained(folder)
    return folder


def _open_logits(cascade: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the cascade with every token in its stage."""
    model = CascadeForCausalLM.from_pretrained(cascade, dtype=torch.float32)
    return model(ids, thresholds=[math.inf]).logits


def _logits(folder: Path, ids: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05  # logits that say something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def base(tmp_path) -> Path:
    return _base(tmp_path / "base", "llama")


@pytest.fixture
def cascade(base, tmp_path) -> Path:
    return _cascade(base, tmp_path / "run")


def _main(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()  # what came before
    code = command.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- a plain model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CASES)
def test_a_merged_model_is_the_cascade_with_open_thresholds(family, tmp_path):
    base = _base(tmp_path / "base", family)
    cascade, ids = _cascade(base, tmp_path / "run"), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(found) is CASES[family][1]
    assert found.config.num_hidden_layers == 3
    _close(found(ids).logits, _open_logits(cascade, ids))
    assert (found(ids).logits - _logits(base, ids)).abs().max() > 0.1  # the base is another model
    tied = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert tied == (family != "llama-untied")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (not tied)


def test_a_stage_of_all_layers(base, tmp_path):
    cascade, ids = _cascade(base, tmp_path / "run", layers=3), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    _close(_logits(tmp_path / "merged", ids), _open_logits(cascade, ids))


def test_a_finished_run_is_exported_and_loads_without_this_package(look_settings, tmp_path, capsys):
    from cascade_fast.cascade import run_cascade

    asked = {**look_settings, "num_stages": 1, "accept": "always", "out": str(tmp_path / "run")}
    with torch.enable_grad():
        run = run_cascade(make_settings(asked)).path
    ids = text_ids()
    code, out, err = _main(capsys, run, "--to", tmp_path / "merged")
    assert (code, err) == (0, "")
    wrote, layers, load = out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'merged'}: LlamaForCausalLM in float32, 0.")
    assert wrote.endswith(" MiB")
    assert layers == "layers a token: 3, as the base (the cascade: 3, and 2 more for a token that enters its stage)"
    script = (
        "import sys; sys.modules['cascade_fast'] = None\n"
        "import torch\nfrom safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, logging\nlogging.disable_progress_bar()\n"
        f"ids = torch.tensor({ids.tolist()})\nmodel = {load.removeprefix('load it: ')}\n"
        f"save_file({{'logits': model(ids).logits.detach()}}, {str(tmp_path / 'logits')!r})\n"
        f"print(type(model).__name__, AutoTokenizer.from_pretrained({str(tmp_path / 'merged')!r})('ab')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == f"LlamaForCausalLM {byte_tokenizer()('ab')['input_ids']}", done.stderr
    _close(load_file(tmp_path / "logits")["logits"], _open_logits(run, ids))


def test_what_a_merged_folder_holds(base, cascade, tmp_path):
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    fields = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**fields, "auto_map": {"AutoTokenizer": "x--y.Z"}}))
    export.export(str(cascade), tmp_path / "out" / "merged", format="merged")
    folder = tmp_path / "out" / "merged"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["dtype"]) == (
        "llama",
        ["LlamaForCausalLM"],
        "float32",
    )
    assert str(tmp_path) not in "".join(p.read_text() for p in folder.glob("*.*") if p.suffix != ".safetensors")
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert GenerationConfig.from_pretrained(folder).temperature == 0.5
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(re.findall(r"\A---\n(.*?)\n---\n", card, re.DOTALL)[0])
    assert metadata == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["cascade"], "license": "mit",
    }  # fmt: skip
    assert "layers 1 to 2" in card
    assert "4.0000" not in card  # measured at another threshold
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace('folder = "."', f"folder = {str(folder)!r}")
    exec(compile(code, "card", "exec"), {})
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {(base / "README.md").stat().st_mode & 0o777}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["merged"]  # nothing temporary


def test_what_was_measured_is_told_where_every_token_enters(base, tmp_path):
    cascade = _cascade(base, tmp_path / "run", threshold=EVERY_TOKEN)
    export.export(str(cascade), tmp_path / "merged", format="merged")
    assert "| test | 10 | 4.0000 | 3.0000 | -25.00% |" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_dtype_that_the_base_is_stored_in(stored, tmp_path):
    """A copy's weights are float32; they are rounded once."""
    base = _base(tmp_path / "base", "llama", stored)
    cascade = _cascade(base, tmp_path / "run")
    export.export(str(cascade), tmp_path / "merged", format="merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {stored}
    stage = load_tensors(cascade / "stages/1/model.safetensors")[0]
    before = load_file(base / "model.safetensors")
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], stage["layers.1.mlp.up_proj.weight"].to(stored))
    assert torch.equal(found["model.norm.weight"], stage["norm.weight"].to(stored))
    for name in ("model.layers.0.mlp.up_proj.weight", export.EMBEDDINGS):
        assert torch.equal(found[name], before[name])


def test_another_dtype_on_request_and_values_beyond_it(base, tmp_path, capsys):
    cascade = _cascade(base, tmp_path / "run")
    assert _main(capsys, cascade, "--to", tmp_path / "one", "--dtype", "bfloat16")[0] == 0
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "bfloat16"
    path = cascade / "stages/1/model.safetensors"
    stage = load_tensors(path)[0]
    stage["norm.weight"] = stage["norm.weight"] + 1e6
    save_tensors(path, stage)
    code, _, err = _main(capsys, cascade, "--to", tmp_path / "two", "--dtype", "float16")
    assert (code, err) == (
        2, "error: dtype: float16; model.norm.weight has values beyond it: use bfloat16 or float32\n",
    )  # fmt: skip
    assert not (tmp_path / "two").exists()


def test_many_files_come_from_many_files(base, cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "20KB")
    model = CascadeForCausalLM.from_pretrained(cascade)
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    export.export(str(tmp_path / "whole"), tmp_path / "merged", format="merged")
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 1
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    ids = text_ids()
    _close(_logits(tmp_path / "merged", ids), _open_logits(cascade, ids))


@pytest.mark.parametrize("self_contained", [True, False])
def test_a_saved_cascade_and_a_moved_base(base, cascade, tmp_path, capsys, self_contained):
    CascadeForCausalLM.from_pretrained(cascade).save_pretrained(tmp_path / "saved", self_contained=self_contained)
    ids = text_ids()
    expected = _open_logits(cascade, ids)
    base.rename(tmp_path / "moved")
    code, _, err = _main(capsys, tmp_path / "saved", "--to", tmp_path / "merged")
    if not self_contained:
        assert (code, "If it lies elsewhere now, pass base_path" in err) == (2, True)
        found = _main(capsys, tmp_path / "saved", "--to", tmp_path / "merged", "--base-path", tmp_path / "moved")
        assert found[0] == 0
    _close(_logits(tmp_path / "merged", ids), expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(base, tmp_path) -> Path:
    """A cascade whose stage is an adapter."""
    return _cascade(base, tmp_path / "adapted", lora=LORA)


@pytest.mark.parametrize("family", CASES)
def test_updates_are_merged(family, tmp_path):
    base = _base(tmp_path / "base", family)
    cascade, ids = _cascade(base, tmp_path / "run", lora=LORA), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    expected = _open_logits(cascade, ids)
    _close(_logits(tmp_path / "merged", ids), expected)
    assert (expected - _logits(base, ids)).abs().max() > 0.1


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

    base = _base(tmp_path / "base", family)
    lora = {**LORA, "targets": targets}
    cascade, ids = _cascade(base, tmp_path / "run", layers=layers, lora=lora), text_ids()
    lines, expected = export.export(str(cascade), tmp_path / "adapter", format="peft"), _open_logits(cascade, ids)
    found = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    assert not [w for w in recwarn if "adapter" in str(w.message).lower() or "keys" in str(w.message).lower()]
    trained = {n for n, _ in found.named_parameters() if "lora_" in n}
    assert len(trained) == 2 * layers * len(targets)
    _close(found(ids).logits, expected)
    _close(found.merge_and_unload()(ids).logits, expected)
    _close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(ids).logits, expected)
    assert lines[-1] == (
        "note: adapter_config.json names the base's folder on this machine: change it before you share it"
    )
    assert lines[0].startswith(
        f"wrote {tmp_path / 'adapter'}: LoRA of rank 4 on {layers * len(targets)} linear layers,"
    )
    scope = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    _close(eval(lines[2].removeprefix("load it: "), scope)(ids).logits, expected)


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
    cascade = _cascade(base, tmp_path / "run", lora={**LORA, "alpha": 6.5})
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
    code, out, err = _main(capsys, adapted, "--to", tmp_path / "adapter", "--format", "peft")
    assert (code, err) == (0, "")
    assert "note: it was trained on the base in 4 bit (nf4): load the base so" in out
    assert 'bnb_4bit_quant_type="nf4"' in (tmp_path / "adapter" / "README.md").read_text()
    code, _, err = _main(capsys, adapted, "--to", tmp_path / "merged")
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
    base = _base(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)
    adapted, ids = _cascade(base, tmp_path / "adapted", lora=LORA), text_ids()
    _trained_on_4_bit(adapted)
    expected = _open_logits(adapted, ids)
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
    expected = _open_logits(run, ids)
    plain = AutoModelForCausalLM.from_pretrained(look_settings["base"], dtype=torch.float32)
    assert (plain(ids).logits - expected).abs().max() > 0.05  # it has learnt something
    for form in ("merged", "peft"):
        assert _main(capsys, run, "--to", tmp_path / form, "--format", form)[0] == 0
        card = (tmp_path / form / "README.md").read_text()
        assert "## Measured" in card  # every token entered in training, too
    _close(_logits(tmp_path / "merged", ids), expected)
    _close(PeftModel.from_pretrained(plain, tmp_path / "peft")(ids).logits, expected)


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_a_whole_cascade_with_an_adapter(base, adapted, tmp_path, capsys, format):
    """A merged model needs nothing else; an adapter has to name its base."""
    CascadeForCausalLM.from_pretrained(adapted).save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    expected, ids = [export.export(str(adapted), tmp_path / "one", format=format)], text_ids()
    expected = _open_logits(adapted, ids)
    base.rename(tmp_path / "moved")
    code, _, err = _main(capsys, tmp_path / "whole", "--to", tmp_path / "two", "--format", format)
    if format == "peft":
        assert (code, "If it lies elsewhere now, pass base_path" in err) == (2, True)
        again = ["--to", tmp_path / "two", "--format", format, "--base-path", tmp_path / "moved"]
        assert _main(capsys, tmp_path / "whole", *again)[0] == 0
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    else:
        _close(_logits(tmp_path / "two", ids), expected)


# --- what cannot be exported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "format", "said"),
    [
        ("look", "merged", "it has 2 stages: a plain model has room for one"),
        ("look", "peft", "it has 2 stages: a plain model has room for one"),
        ("warm", "merged", "its stages come after the base's last layer"),
        ("seed", "peft", "its stages come after the base's last layer"),
    ],
)
def test_stages_that_no_plain_model_has(tiny_runs, tmp_path, capsys, run, format, said):
    code, out, err = _main(capsys, tiny_runs[run], "--to", tmp_path / "out", "--format", format)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: format: '{format}'; {said}")
    assert not (tmp_path / "out").exists()


def test_a_run_that_kept_no_stage_and_a_copy_as_an_adapter(base, cascade, tmp_path, capsys):
    code, _, err = _main(capsys, cascade, "--to", tmp_path / "out", "--format", "peft")
    assert (code, "format: 'peft'; its stage is a trained copy of whole layers" in err) == (2, True)
    assert "use --format merged, or train with --adapter lora" in err
    config = json.loads((cascade / "config.json").read_text())
    (cascade / "config.json").write_text(json.dumps({**config, "stages": []}))
    code, _, err = _main(capsys, cascade, "--to", tmp_path / "out")
    assert (code, "kept no stage, so the cascade is its base" in err) == (2, True)


def test_a_folder_that_is_not_empty_is_left_alone(cascade, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    for to in (tmp_path / "photos", tmp_path / "photos" / "cat.jpg", tmp_path / "photos" / "cat.jpg" / "deeper"):
        code, _, err = _main(capsys, cascade, "--to", to)
        assert code == 2
        assert err.startswith(f"error: to: {str(to)!r}; ")
        assert "is not empty" in err or "is a file" in err
    assert [p.read_text() for p in (tmp_path / "photos").iterdir()] == ["meow"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert _main(capsys, cascade, "--to", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "config.json").is_file()


def test_what_fails_midway_leaves_nothing(cascade, tmp_path, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "render_merged_card", full)  # after the weights
    with pytest.raises(DiskFull, match=r"merged' needs 0\.\d MiB"):
        export.export(str(cascade), tmp_path / "out" / "merged", format="merged")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("run", ["no-such-run", "empty"])
def test_what_is_no_cascade(tmp_path, capsys, run):
    (tmp_path / "empty").mkdir()
    code, _, err = _main(capsys, tmp_path / run, "--to", tmp_path / "out")
    assert (code, err.startswith("error: ")) == (2, True)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_configuration(cascade, adapted, tmp_path):
    path = cascade / "stages/1/model.safetensors"
    whole = load_tensors(path)[0]
    for wrong in (
        {n: t for n, t in whole.items() if n != "norm.weight"},
        {**whole, "norm.weight": torch.ones(3)},
        {**whole, "layers.2.mlp.up_proj.weight": torch.ones(3)},
    ):
        save_tensors(path, wrong)
        with pytest.raises(DamagedFile, match="stage 1 are not those of the layers"):
            export.export(str(cascade), tmp_path / "out", format="merged")
    path = adapted / "stages/1/model.safetensors"
    updates = load_tensors(path)[0]
    name = "layers.0.mlp.up_proj.lora_B.weight"
    for wrong, said in (
        ({n: t for n, t in updates.items() if n != name}, "no update of model.layers.1.mlp.up_proj"),
        ({**updates, name: updates[name][:, :2]}, "no update of model.layers.1.mlp.up_proj"),
        ({**updates, "norm.weight": torch.ones(32)}, "stage 1 has model.norm.weight"),
    ):
        save_tensors(path, wrong)
        for format in ("merged", "peft"):
            with pytest.raises(DamagedFile, match=said):
                export.export(str(adapted), tmp_path / "out", format=format)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile):
        export.export(str(adapted), tmp_path / "out", format="merged")
    path.unlink()
    with pytest.raises(DamagedFile, match="is missing"):
        export.export(str(adapted), tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()


def test_a_base_that_holds_other_weights_too(base, cascade, tmp_path):
    """As Mistral's own format beside transformers', and buffers of old checkpoints."""
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "other" / "consolidated.safetensors")
    other = _cascade(tmp_path / "other", tmp_path / "run2")
    export.export(str(other), tmp_path / "merged", format="merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


# --- llama.cpp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CASES)
def test_llama_cpp_knows_every_weight(family, tmp_path):
    """Its converter's own table of names."""
    gguf = pytest.importorskip("gguf")
    cascade = _cascade(_base(tmp_path / "base", family), tmp_path / "run")
    export.export(str(cascade), tmp_path / "merged", format="merged")
    kind = json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"]
    arch = getattr(gguf.MODEL_ARCH, {"mistral": "llama"}.get(kind, kind).upper())
    names = gguf.get_tensor_name_map(arch, 3)
    known = {
        n: names.get_name(n, try_suffixes=(".weight", ".bias"))
        for n in load_file(tmp_path / "merged/model.safetensors")
    }
    assert None not in known.values(), known
    assert len(set(known.values())) == len(known)


def test_configuration_is_unchanged_by_an_export(cascade, tmp_path):
    before = {p: p.read_bytes() for p in cascade.rglob("*") if p.is_file()}
    export.export(str(cascade), tmp_path / "merged", format="merged")
    assert before == {p: p.read_bytes() for p in cascade.rglob("*") if p.is_file()}
    assert CascadeConfig.from_pretrained(cascade).entry_layer == ENTRY
