"""No code of a repository runs, and nothing is unpickled: what would need it is refused in one line."""

import builtins
import json
import pickle
import shutil
import sys

import pytest
import torch
from conftest import save_tiny_base
from transformers import AutoModelForCausalLM

from cascade_fast import generate, plan, train
from cascade_fast.base.model import find_base
from cascade_fast.input_checks import InputError
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.settings import make_settings

MAP = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
TOKENIZER_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.fixture(autouse=True)
def _at_a_terminal(monkeypatch):
    """transformers would ask there whether to run the code; nobody may be asked."""

    def asked(*_):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


@pytest.fixture
def repository(tiny_base, tmp_path):
    """Makes a copy of the tiny base with code of its own, and fields in its two configurations."""

    def make(config=None, tokenizer=None):
        folder = tmp_path / "repository"
        shutil.copytree(tiny_base, folder)
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
        for name, changed in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            fields = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**fields, **(changed or {})}))
        return folder

    yield make
    assert not (tmp_path / "ran").exists()


def _base(folder):
    return find_base(make_settings({"base": str(folder), "seq_len": 8}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "evil", "auto_map": MAP},
            "a model of type 'evil' needs code of its repository, which is never run",
        ),
        ({"model_type": ["evil"], "auto_map": MAP}, "a model of type a list needs code of its repository"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "somebody/else--evil.Evil"}}, "'evil' needs code"),
        ({"model_type": "evil"}, "its configuration cannot be read: "),
    ],
)
def test_a_base_that_needs_code_is_refused(repository, tmp_path, capsys, config, said):
    folder = repository(config)
    assert train.main(["--base", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert plan.main(["--base", str(folder)]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"error: base: {str(folder)!r}; ")
        assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "EvilTokenizer", "auto_map": TOKENIZER_MAP},
        {"tokenizer_class": "EvilTokenizer", "auto_map": ["evil.Evil", None]},
        {"tokenizer_class": None, "auto_map": TOKENIZER_MAP},
    ],
)
def test_a_tokenizer_that_needs_code_is_refused(repository, fields):
    with pytest.raises(
        InputError, match=r"; a tokenizer of class \w+ needs code of its repository, which is never run"
    ):
        _base(repository(tokenizer=fields)).tokenizer()


def test_code_beside_a_known_model_is_left_alone_and_that_is_said(repository, tiny_base, capsys):
    base = _base(repository({"auto_map": MAP}, {"auto_map": TOKENIZER_MAP}))
    assert "comes with code of its own, which is never run: transformers' llama is used" in capsys.readouterr().err
    assert base.tokenizer()("ab")["input_ids"] == _base(tiny_base).tokenizer()("ab")["input_ids"]
    weights = base.load(torch.device("cpu"), torch.float32).state_dict()
    assert all(
        torch.equal(weights[n], w) for n, w in AutoModelForCausalLM.from_pretrained(tiny_base).state_dict().items()
    )


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_attention_kernels_that_a_file_names_are_not_fetched(repository, tiny_runs, tmp_path, name):
    base = _base(repository({name: "somebody/kernels"}))
    assert base.load(torch.device("cpu"), torch.float32).config._attn_implementation == "sdpa"
    CascadeForCausalLM.from_pretrained(tiny_runs["warm"]).save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    fields["base_config"][name] = fields[name] = "somebody/kernels"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(fields))
    assert CascadeForCausalLM.from_pretrained(tmp_path / "saved").base.config._attn_implementation == "sdpa"


def test_a_cascade_s_folder_runs_no_code_even_if_told_to(tiny_runs, tmp_path):
    CascadeForCausalLM.from_pretrained(tiny_runs["warm"]).save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef generate(model): pass\n")
    for load in (CascadeForCausalLM, AutoModelForCausalLM):
        load.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Pickled: a call that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("hostile", [True, False])
def test_a_cascade_in_a_pickle_is_refused(tiny_runs, tmp_path, capsys, hostile):
    model = CascadeForCausalLM.from_pretrained(tiny_runs["warm"])
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if hostile:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    said = "has no model.safetensors: weights are only ever read from safetensors or GGUF"
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(InputError, match=said):
            CascadeForCausalLM.from_pretrained(folder, **options)
    assert generate.main([str(folder), "a"]) == 2
    assert capsys.readouterr().err == f"error: cascade: {str(folder)!r}; {said}\n"
    assert not (tmp_path / "ran").exists()


def test_a_base_in_a_pickle_is_refused(tmp_path):
    folder = save_tiny_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"no .safetensors weights in "):
        _base(folder)
    assert not (tmp_path / "ran").exists()
