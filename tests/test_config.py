"""Settings: presets, validation, YAML, flags."""

import dataclasses

import pytest

from cascade_fast.config import PRESETS, ConfigError, RunConfig, make_config
from cascade_fast.train import build_parser


def test_seed_preset_is_the_original_experiment():
    seed = make_config({"preset": "seed"})
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
    config = make_config({"preset": "second-look", "layers_per_stage": 4})
    assert (config.stage_kind, config.num_stages, config.layers_per_stage) == ("second-look", 1, 4)
    assert (config.criterion, config.hard_ratio) == (make_config({}).criterion, make_config({}).hard_ratio)


def test_flags_override_file_overrides_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: seed\nhard-ratio: 0.5\nlr: 1e-3\ntext_columns: text\nmax_minutes: null\n")
    config = make_config({"hard_ratio": "0.7"}, str(file))
    assert config.hard_ratio == 0.7
    assert config.lr == 1e-3  # YAML reads 1e-3 as text
    assert config.text_columns == ("text",)
    assert config.epochs == 10  # the seed's
    assert config.max_minutes is None


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
        ("preset", "hot", "preset: 'hot'; must be one of warm, second-look, seed"),
        ("dtype", "int8", "dtype: 'int8'; must be one of"),
        ("hard_ration", 0.5, "hard_ration: no such setting; did you mean hard_ratio"),
        ("optimizer", None, "optimizer: empty"),
        ("seed", -1, "seed: -1"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, said):
    with pytest.raises(ConfigError, match=said):
        make_config({name: value})


def test_columns_and_template_together_are_refused():
    with pytest.raises(ConfigError, match="text_columns and text_template"):
        make_config({"text_columns": ["a"], "text_template": "{a}"})


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n"])
def test_an_unreadable_config_file_is_an_error(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="config: "):
        make_config({}, str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        make_config({}, str(tmp_path / "absent.yaml"))


def test_settings_survive_json():
    for preset in PRESETS:
        config = make_config({"preset": preset, "text_columns": ["a", "b"]})
        assert make_config(config.to_dict()) == config


def test_every_setting_is_a_flag_with_a_help_sentence():
    actions = {action.dest: action for action in build_parser()._actions}
    for f in dataclasses.fields(RunConfig):
        assert f.name in actions
        assert len(actions[f.name].help) > 15
