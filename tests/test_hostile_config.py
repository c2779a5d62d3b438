"""``config.json`` of a cascade with wrong values in every field: a line that says so, or a cascade that still runs."""

import copy
import json
import math
import random

import pytest
import torch
from transformers import AutoConfig

from cascade_fast import evaluate, generate
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import read_json

WRONG = [
    None,
    True,
    0,
    -1,
    3,
    10**9,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    "\x1b[31m",
    [],
    [[]],
    ["x"],
    {},
    {"a": 1},
]
ABSENT = object()
# What says how and where a run was made: nothing that makes a model. Settings are checked where they are used.
RECORD = ("settings", "versions", "machine", "fingerprints", "kv")
# Fields of transformers' own that it takes any value for, and that change nothing here.
FREE = ("id2label", "label2id", "architectures", "transformers_version")


@pytest.fixture(scope="module")
def fields(tiny_runs):
    return {kind: read_json(tiny_runs[kind] / "config.json") for kind in ("warm", "look")}  # without its checksum


def _places(value, place=()):
    """Every field, of lists the first entry, as the path of names that leads to it."""
    if place:
        yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, inner in entries:
        if name not in FREE and (place or name not in RECORD):
            yield from _places(inner, (*place, name))


def _changed(fields, place, wrong):
    changed = copy.deepcopy(fields)
    owner = changed
    for name in place[:-1]:
        owner = owner[name]
    if wrong is ABSENT:
        del owner[place[-1]]
    else:
        owner[place[-1]] = wrong
    return changed


@pytest.mark.parametrize("kind", ["warm", "look"])
def test_a_wrong_value_anywhere_is_one_line(fields, kind):
    places = [p for p in _places(fields[kind])]
    assert len(places) > 60
    refused = 0
    for place in places:
        for wrong in [ABSENT, *WRONG]:
            try:
                config = CascadeConfig.from_dict(_changed(fields[kind], place, wrong))
            except InputError as error:  # nothing else may come
                refused += 1
                message = str(error)
                assert message.startswith("config.json: "), place
                assert message.isprintable(), place
                assert len(message) < 1000, place
            else:
                config.check()
    assert refused > len(places) * len(WRONG) / 2


@pytest.mark.parametrize("content", ["[]", "[1]", "3", "null", '"x"', "{}", "", "{", "\xff"])
def test_a_file_that_holds_no_configuration(tiny_runs, tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    for command in (generate.main, evaluate.main):
        assert command([str(tmp_path), *(["a"] if command is generate.main else [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (("model_type",), "llama", "config.json: model_type 'llama'; must be 'cascade'"),
        (("criterion",), "mood", "config.json: criterion: 'mood'; must be one of cosine, entropy"),
        (("stages",), {"1": {}}, "config.json: stages: a map; must be a list"),
        (("stages", 0), "x", "config.json: stages: stage 1: 'x'; must be a map"),
        (("stages", 0, "threshold"), math.nan, "config.json: stages: stage 1: threshold nan; must not be NaN"),
        (("stages", 0, "threshold"), "0.5", "config.json: stages: stage 1: threshold: '0.5'; must be a number"),
        (("stages", 0, "threshold"), ABSENT, "config.json: stages: stage 1: has no threshold"),
        (("stages", 0, "layers"), 10**9, "config.json: stages: stage 1: layers 1000000000; must be from 1 to 1024"),
        (("stages", 0, "vocab_size"), 5, "config.json: stages: stage 1: vocab_size 5; must be 300, as the base has it"),
        (("stages", 0, "magic"), 5, "config.json: stages: stage 1: 'magic'; no such field"),
        (("base_config", "model_type"), "gpt2", "config.json: base_config: model_type 'gpt2'; must be one of llama, "),
        (("base_config", "num_hidden_layers"), 10**9, "config.json: base_config: num_hidden_layers 1000000000; must"),
        (("base_config", "num_attention_heads"), 0, "config.json: base_config: "),
        (("base_config", "rms_norm_eps"), math.nan, "config.json: base_config: rms_norm_eps nan; must be in (0, 1)"),
        (("base", "fingerprint"), ABSENT, "base: the configuration has no fingerprint of it"),
        (("base", "name"), ["x"], "config.json: base: name: a list; must be text or empty"),
        (("dtype",), "float7", "config.json: cannot be read: module 'torch' has no attribute 'float7'"),
        (("settings", "base_quantization"), 4, "base_quantization: 4; must be text"),
        (("settings", "cache_dir"), 4, "settings: cache_dir: 4; must be text or empty"),
    ],
)
def test_what_is_said(fields, tiny_runs, tmp_path, capsys, place, wrong, said):
    (tmp_path / "stages").symlink_to(tiny_runs["warm"] / "stages")
    changed = _changed(fields["warm"], place, wrong)
    if place[-1] == "base_quantization":  # of a run from before the reference had it
        del changed["base"]["quantization"]
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert generate.main([str(tmp_path), "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["warm", "look"])
def test_a_wrong_value_anywhere_on_the_command_line(tiny_runs, tmp_path, capsys, kind, whole):
    """150 of them, settings and records too: a line and exit code 2, or a cascade that runs."""
    CascadeForCausalLM.from_pretrained(tiny_runs[kind]).save_pretrained(tmp_path / "run", self_contained=whole)
    fields = read_json(tmp_path / "run" / "config.json")
    chance = random.Random(0)
    records = [name for name in RECORD if isinstance(fields.get(name), dict)]
    places = [*_places(fields), *((name, inner) for name in records for inner in fields[name])]
    codes = []
    for _ in range(150):
        changed = _changed(fields, chance.choice(places), chance.choice([ABSENT, *WRONG]))
        (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
        for command, more in (
            (generate, ["a b", "--max-new-tokens", "2"]),
            (evaluate, ["--no-flops", "--blocks", "1"]),
        ):
            codes.append(command.main([str(tmp_path / "run"), *more]))
            errors = capsys.readouterr().err.splitlines()
            assert codes[-1] in (0, 2)
            if codes[-1] == 2:
                (line,) = errors
                assert line.startswith("error: ")
                assert line.isprintable()
    assert codes.count(2) > 60


def test_settings_that_evaluation_needs(fields, tiny_runs, tmp_path, capsys):
    (tmp_path / "stages").symlink_to(tiny_runs["warm"] / "stages")
    for name, wrong, said in (
        ("seq_len", "long", "seq_len: 'long'; must be an integer"),
        ("train_blocks", [], "train_blocks: a list; must be an integer, or all"),
        ("dataset", {}, "dataset: a map; must be text"),
        ("magic", 1, "magic: no such setting"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(_changed(fields["warm"], ("settings", name), wrong)))
        assert evaluate.main([str(tmp_path), "--no-flops"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_the_base_is_what_its_fingerprint_says_whatever_the_file_does(fields, tiny_runs, tmp_path):
    """Of a folder without the base's weights: what the file says of the base is not needed."""
    (tmp_path / "stages").symlink_to(tiny_runs["warm"] / "stages")
    changed = _changed(fields["warm"], ("base_config", "rms_norm_eps"), 1e-2)
    for stage in changed["stages"]:
        stage["rms_norm_eps"] = 1e-2
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"stages: stage 1: rms_norm_eps 0\.01; must be 1e-06, as the base has it"):
        CascadeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["warm", "look"])
def test_weights_that_are_not_those_of_the_configuration(tiny_runs, tmp_path, kind):
    from safetensors.torch import load_file, save_file

    CascadeForCausalLM.from_pretrained(tiny_runs[kind]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.startswith("stages.1.") and n.endswith("up_proj.weight"))
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(said, state=weights, stages=config["stages"]):
        save_file(state, file, metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps({**config, "stages": stages}))
        with pytest.raises(InputError, match=said):
            CascadeForCausalLM.from_pretrained(tmp_path)

    refused(rf"1 differ, as {name}", {n: w for n, w in weights.items() if n != name})
    refused(r"cannot be loaded: ", {**weights, name: torch.zeros(3, 3)})
    refused(r"differ, as stages\.1\.", stages=config["stages"][:1])
    refused(r"differ, as stages\.2\.", stages=[*config["stages"], config["stages"][0]])
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = CascadeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (len(model.stages), list(info["missing_keys"])) == (2, [])
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be loaded: "):
        CascadeForCausalLM.from_pretrained(tmp_path)


def test_auto_config_says_the_same(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_changed(fields["warm"], ("stages",), 3)))
    with pytest.raises(InputError, match=r"config\.json: stages: 3; must be a list"):
        AutoConfig.from_pretrained(tmp_path)
