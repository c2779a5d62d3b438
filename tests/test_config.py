"""Settings: presets, validation, YAML, flags."""

import dataclasses

import pytest

from cascade_fast.input_checks import ALL, OTHER_NAMES, InputError, template_parts
from cascade_fast.presets import PRESETS
from cascade_fast.resume import saved_settings, settings_differences
from cascade_fast.settings import RunSettings, make_settings
from cascade_fast.train import build_parser


def test_seed_preset_is_the_original_experiment():
    seed = make_settings({"preset": "seed"})
    assert (seed.hard_ratio, seed.layers_per_stage, seed.num_stages, seed.epochs) == (0.9, 8, 5, 10)
    assert (seed.batch_tokens, seed.lr, seed.patience) == (32, 1e-4, 1)
    assert (seed.train_blocks, seed.val_blocks, seed.seq_len) == (1000, 100, 128)
    assert (seed.init, seed.head, seed.accept, seed.val_selection, seed.reads) == (
        "random", "own", "always", "quantile", "last_hidden",
    )  # fmt: skip
    assert (seed.dtype, seed.lr_schedule, seed.warmup_steps, seed.grad_clip, seed.weight_decay) == (
        "float32", "constant", 0, 0.0, 0.01,
    )  # fmt: skip


def test_the_second_look_preset_takes_flags_like_any_other():
    settings = make_settings({"preset": "second-look", "layers_per_stage": 4})
    assert (settings.stage_kind, settings.num_stages, settings.layers_per_stage) == ("second-look", 1, 4)
    assert (settings.criterion, settings.hard_ratio) == (make_settings({}).criterion, make_settings({}).hard_ratio)


def test_flags_override_file_overrides_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: seed\nhard-ratio: 0.5\nlr: 1e-3\ntext_columns: text\nmax_minutes: null\n")
    settings = make_settings({"hard_ratio": "0.7"}, str(file))
    assert settings.hard_ratio == 0.7
    assert settings.lr == 1e-3  # YAML reads 1e-3 as text
    assert settings.text_columns == ("text",)
    assert settings.epochs == 10  # the seed's
    assert settings.max_minutes is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hard_ratio", 0.0, r"hard_ratio: 0.0; must be in \(0, 1\]"),
        ("hard_ratio", 1.5, r"hard_ratio: 1.5; must be in \(0, 1\]"),
        ("hard_ratio", "nan", "hard_ratio: nan; must be a finite number"),
        ("hard_ratio", "much", "hard_ratio: 'much'; must be a number"),
        ("epochs", 0, "epochs: 0; must be at least 1"),
        ("epochs", "2.5", "epochs: '2.5'; must be an integer"),
        ("lr", -1.0, "lr: -1.0; must be above 0"),
        ("seq_len", 1, "seq_len: 1; must be at least 2"),
        ("criterion", "vibes", "criterion: 'vibes'; must be one of cosine, entropy"),
        ("preset", "hot", "preset: 'hot'; must be one of warm, lora, second-look, seed"),
        ("dtype", "int8", "dtype: 'int8'; must be one of"),
        ("hard_ration", 0.5, "hard_ration: no such setting; did you mean hard_ratio"),
        ("optimizer", None, "optimizer: empty"),
        ("seed", -1, "seed: -1"),
        ("lr", [1e-3], "lr: a list; must be a number"),
        ("lr", {"peak": 1e-3}, "lr: a map; must be a number"),
        ("lr", 10**400, "lr: 1000"),
        ("criterion", ["entropy"], "criterion: a list; must be text$"),
        ("criterion", True, r"criterion: True; must be text \(in quotes, if it is meant so\)"),
        ("preset", ["warm"], "preset: a list; must be one of warm"),
        ("text_columns", ["a", 3], "text_columns: 3; must be text"),
        ("dataset", "a\0b", "dataset: 'a.x00b'; must not hold the character zero"),
        ("train_blocks", 0, "train_blocks: 0; must be at least 1, or all"),
        ("train_blocks", -1, "train_blocks: -1; must be at least 1, or all"),
        ("train_blocks", "most", "train_blocks: 'most'; must be an integer, or all"),
        ("test_blocks", "-1", "test_blocks: -1; must be at least 0, or all"),
        ("val_blocks", "all", "val_blocks: 'all'; must be an integer$"),
        ("shuffle", "yes", "shuffle: 'yes'; must be one of on, off"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, said):
    with pytest.raises(InputError, match=said):
        make_settings({name: value})


def test_columns_and_template_together_are_refused():
    with pytest.raises(InputError, match="text_columns and text_template"):
        make_settings({"text_columns": ["a"], "text_template": "{a}"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n- b\n", "; must hold 'name: value' lines"),
        ("lr: 1\na: [1\n", ", line 3, column 1: expected ',' or ']'"),
        ("a: b: c\n", ", line 1, column 5: mapping values are not allowed here"),
        ("\tlr: 1\n", ", line 1, column 1: found character"),
        ("lr: 1\nseed: 3\nlr: 2\n", ", line 3: lr is given twice, first in line 1"),
        ("hard-ratio: 0.1\nhard_ratio: 0.2\n", ", line 2: hard_ratio is given twice, first in line 1"),
        ("? [a]\n: 1\n", ", line 1: a list or map as a name"),
        ("lr: *gone\n", ", line 1, column 5: found undefined alias"),
        ("---\nlr: 1\n---\nlr: 2\n", ", line 3, column 1: but found another document"),
        ("out: !!python/object/apply:os.getcwd []\n", ", line 1, column 6: could not determine a constructor"),
        ("out: 2024-13-45\n", "; a value cannot be read: month must be in 1..12"),
        ("out: \x01\n", ", line 1: character 1 is not allowed in YAML"),
        ("a: " + "[" * 3000, "; lists or maps within one another too deeply"),
        ("lr: 1\nout: caf\xe9\n".encode("latin-1"), ", line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (None, " cannot be read: No such file or directory"),
    ],
)
def test_an_unreadable_config_file_is_named_with_the_line(tmp_path, content, said):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        make_settings({}, str(file))
    assert str(raised.value).startswith(f"config: {str(file)!r}{said}")
    assert "\n" not in str(raised.value)


def test_what_yaml_reads_as_something_else(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("\ufeffshuffle: off\ntext_columns: [a, b]\ntrain-blocks: all\n", encoding="utf-8")
    settings = make_settings({}, str(file))
    assert (settings.shuffle, settings.text_columns, settings.train_blocks) == ("off", ("a", "b"), ALL)
    file.write_text("base: &b [x, x]\n")
    with pytest.raises(InputError, match="base: a list; must be text"):
        make_settings({}, str(file))
    file.write_text("")
    assert make_settings({}, str(file)) == RunSettings()


@pytest.mark.parametrize(
    "template",
    [
        "{text:d}", "{text!x}", "{text!r}", "{text:{text.__class__}}", "{text:>99999999999}", "{text.upper}",
        "{text[0]}",
        "{}", "{0}", "{", "}", "{text", "a {b} {c:}} d",
    ],
)  # fmt: skip
def test_a_template_takes_names_of_columns_alone(template):
    with pytest.raises(InputError, match=r"^text_template: .*between braces stands a column's name alone") as raised:
        make_settings({"text_template": template})
    assert template.strip("a d") in str(raised.value)


def test_the_parts_of_a_template():
    assert template_parts("{{{a}}}: {b c}") == [("{", None), ("", "a"), ("}", None), (": ", "b c")]
    assert make_settings({"text_template": "Q: {question}\n"}).text_template == "Q: {question}\n"


def test_other_trainers_names_are_known():
    for theirs, ours in OTHER_NAMES.items():
        assert theirs not in RunSettings.__dataclass_fields__
        with pytest.raises(InputError, match=f"^{theirs}: no such setting; did you mean {ours} \\("):
            make_settings({theirs: 1})


def test_values_of_the_wrong_type_are_refused_in_python_too():
    for wrong in ({"epochs": "2"}, {"lr": None}, {"epochs": True}, {"text_columns": ["a"]}, {"out": 3}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: .*; must be"):
            RunSettings(**wrong)
    assert RunSettings(lr=1).lr == 1


def test_all_is_one_split_s():
    settings = make_settings({"train_blocks": "all"})
    assert (settings.train_blocks, settings.to_dict()["train_blocks"]) == (ALL, "all")
    with pytest.raises(InputError, match="train_blocks, test_blocks: all; only one of them"):
        make_settings({"train_blocks": "all", "test_blocks": "all"})


def test_runs_from_before_shuffle_read_in_order():
    before = {name: value for name, value in make_settings({}).to_dict().items() if name != "shuffle"}
    assert make_settings(saved_settings(before)).shuffle == "off"
    assert make_settings(saved_settings(make_settings({}).to_dict())).shuffle == "on"
    assert (make_settings({}).shuffle, make_settings({"preset": "seed"}).shuffle) == ("on", "off")


def test_settings_survive_json():
    for preset in PRESETS:
        settings = make_settings({"preset": preset, "text_columns": ["a", "b"], "test_blocks": "all"})
        assert make_settings(settings.to_dict()) == settings


def test_every_setting_is_a_flag_with_a_help_sentence():
    actions = {action.dest: action for action in build_parser()._actions}
    for f in dataclasses.fields(RunSettings):
        assert f.name in actions
        assert len(actions[f.name].help) > 15


def test_a_run_that_an_earlier_version_began_may_go_on():
    """It knew fewer settings, and saved a default size as it was asked for."""
    now = make_settings({"train_blocks": 40, "val_blocks": 12, "test_blocks": 12, "shuffle": "off"}).to_dict()
    known = {name: value for name, value in now.items() if name not in ("encoding", "streaming", "shuffle", "loss_on")}
    assert settings_differences({**known, "test_blocks": None}, now) == []
    assert settings_differences({**known, "val_blocks": 13}, now) == ["val_blocks was 13, is 12"]
    assert settings_differences(known, {**now, "encoding": "latin-1"}) == ["encoding was 'utf-8', is 'latin-1'"]
