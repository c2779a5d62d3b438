"""One second look as a plain model or a LoRA adapter: the logits of the cascade with open thresholds, without us."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_tokenizer, text_ids
from export_cases import (
    CASES,
    ENTRY,
    LORA,
    check_close,
    open_logits,
    plain_logits,
    random_base,
    run_export,
    second_look_run,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cascade_fast.model import export
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import DamagedFile, DiskFull, load_tensors, save_tensors
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.settings import make_settings

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def base(tmp_path) -> Path:
    return random_base(tmp_path / "base", "llama")


@pytest.fixture
def cascade(base, tmp_path) -> Path:
    return second_look_run(base, tmp_path / "run")


# --- a plain model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CASES)
def test_a_merged_model_is_the_cascade_with_open_thresholds(family, tmp_path):
    base = random_base(tmp_path / "base", family)
    cascade, ids = second_look_run(base, tmp_path / "run"), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(found) is CASES[family][1]
    assert found.config.num_hidden_layers == 3
    check_close(found(ids).logits, open_logits(cascade, ids))
    assert (found(ids).logits - plain_logits(base, ids)).abs().max() > 0.1  # the base is another model
    tied = found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert tied == (family != "llama-untied")
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (not tied)


def test_a_stage_of_all_layers(base, tmp_path):
    cascade, ids = second_look_run(base, tmp_path / "run", layers=3), text_ids()
    export.export(str(cascade), tmp_path / "merged", format="merged")
    check_close(plain_logits(tmp_path / "merged", ids), open_logits(cascade, ids))


def test_a_finished_run_is_exported_and_loads_without_this_package(look_settings, tmp_path, capsys):
    from cascade_fast.cascade import run_cascade

    asked = {**look_settings, "num_stages": 1, "accept": "always", "out": str(tmp_path / "run")}
    with torch.enable_grad():
        run = run_cascade(make_settings(asked)).path
    ids = text_ids()
    code, out, err = run_export(capsys, run, "--to", tmp_path / "merged")
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
    check_close(load_file(tmp_path / "logits")["logits"], open_logits(run, ids))


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
    cascade = second_look_run(base, tmp_path / "run", threshold=EVERY_TOKEN)
    export.export(str(cascade), tmp_path / "merged", format="merged")
    assert "| test | 10 | 4.0000 | 3.0000 | -25.00% |" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_dtype_that_the_base_is_stored_in(stored, tmp_path):
    """A copy's weights are float32; they are rounded once."""
    base = random_base(tmp_path / "base", "llama", stored)
    cascade = second_look_run(base, tmp_path / "run")
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
    cascade = second_look_run(base, tmp_path / "run")
    assert run_export(capsys, cascade, "--to", tmp_path / "one", "--dtype", "bfloat16")[0] == 0
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "bfloat16"
    path = cascade / "stages/1/model.safetensors"
    stage = load_tensors(path)[0]
    stage["norm.weight"] = stage["norm.weight"] + 1e6
    save_tensors(path, stage)
    code, _, err = run_export(capsys, cascade, "--to", tmp_path / "two", "--dtype", "float16")
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
    check_close(plain_logits(tmp_path / "merged", ids), open_logits(cascade, ids))


@pytest.mark.parametrize("self_contained", [True, False])
def test_a_saved_cascade_and_a_moved_base(base, cascade, tmp_path, capsys, self_contained):
    CascadeForCausalLM.from_pretrained(cascade).save_pretrained(tmp_path / "saved", self_contained=self_contained)
    ids = text_ids()
    expected = open_logits(cascade, ids)
    base.rename(tmp_path / "moved")
    code, _, err = run_export(capsys, tmp_path / "saved", "--to", tmp_path / "merged")
    if not self_contained:
        assert (code, "If it lies elsewhere now, pass base_path" in err) == (2, True)
        found = run_export(capsys, tmp_path / "saved", "--to", tmp_path / "merged", "--base-path", tmp_path / "moved")
        assert found[0] == 0
    check_close(plain_logits(tmp_path / "merged", ids), expected)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


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
    code, out, err = run_export(capsys, tiny_runs[run], "--to", tmp_path / "out", "--format", format)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: format: '{format}'; {said}")
    assert not (tmp_path / "out").exists()


def test_a_run_that_kept_no_stage_and_a_copy_as_an_adapter(base, cascade, tmp_path, capsys):
    code, _, err = run_export(capsys, cascade, "--to", tmp_path / "out", "--format", "peft")
    assert (code, "format: 'peft'; its stage is a trained copy of whole layers" in err) == (2, True)
    assert "use --format merged, or train with --adapter lora" in err
    config = json.loads((cascade / "config.json").read_text())
    (cascade / "config.json").write_text(json.dumps({**config, "stages": []}))
    code, _, err = run_export(capsys, cascade, "--to", tmp_path / "out")
    assert (code, "kept no stage, so the cascade is its base" in err) == (2, True)


def test_a_folder_that_is_not_empty_is_left_alone(cascade, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    for to in (tmp_path / "photos", tmp_path / "photos" / "cat.jpg", tmp_path / "photos" / "cat.jpg" / "deeper"):
        code, _, err = run_export(capsys, cascade, "--to", to)
        assert code == 2
        assert err.startswith(f"error: to: {str(to)!r}; ")
        assert "is not empty" in err or "is a file" in err
    assert [p.read_text() for p in (tmp_path / "photos").iterdir()] == ["meow"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run_export(capsys, cascade, "--to", tmp_path / "link")[0] == 0
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
    code, _, err = run_export(capsys, tmp_path / run, "--to", tmp_path / "out")
    assert (code, err.startswith("error: ")) == (2, True)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_configuration(base, cascade, tmp_path):
    adapted = second_look_run(base, tmp_path / "adapted", lora=LORA)
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
    other = second_look_run(tmp_path / "other", tmp_path / "run2")
    export.export(str(other), tmp_path / "merged", format="merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


# --- llama.cpp --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CASES)
def test_llama_cpp_knows_every_weight(family, tmp_path):
    """Its converter's own table of names."""
    gguf = pytest.importorskip("gguf")
    cascade = second_look_run(random_base(tmp_path / "base", family), tmp_path / "run")
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
