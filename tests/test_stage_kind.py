"""A stage kind is one file and one line: one of this test's own trains, goes on, is evaluated and writes text."""

import sys
from types import ModuleType

import pytest
import torch
from conftest import text_ids
from torch import nn

from cascade_fast import CascadeForCausalLM, make_settings, presets, run_cascade
from cascade_fast.base.sequences import Sequences
from cascade_fast.input_checks import InputError
from cascade_fast.model.measuring import evaluate_cascade
from cascade_fast.runtime.files import read_json
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.counts import StageCounts
from cascade_fast.stages.kind import StageKind, get_kind

# --- the file ---------------------------------------------------------------------------------------------------------


class ShiftLayer(nn.Module):
    """Adds a vector to every token."""

    def __init__(self, config):
        super().__init__()
        self.shift_D = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x_KD, added_KD):
        x_KD = x_KD if added_KD is None else x_KD + added_KD
        return x_KD, self.shift_D.expand_as(x_KD)


class ShiftStage(AppendedStage):
    def __init__(self, config, *, head_VD, norm_D=None, seed=None):
        super().__init__(config, head_VD=head_VD, seed=None)
        self.layers = nn.ModuleList(ShiftLayer(config) for _ in range(config.layers))
        if norm_D is not None:
            self.norm.weight.data.copy_(norm_D)


class ShiftCounts(StageCounts):
    def layer_matrices(self):
        return 0

    def layer_trained(self):
        return self.config.hidden_size


class Shift(StageKind):
    name = "test-shift"
    layer_class = ShiftLayer

    def describe(self, config):
        return "vectors that are added to its *hard* tokens"

    def new(self, settings, base_config, passed, before, number):
        return ShiftStage(self.config(settings, base_config), head_VD=passed.head_VD, norm_D=passed.norm_D)

    def empty(self, config, head_VD=None):
        return ShiftStage(config, head_VD=head_VD)

    def counts(self, config):
        return ShiftCounts(config)


@pytest.fixture
def shift(monkeypatch):
    module = ModuleType("cascade_fast.stages.test_shift")
    module.KIND = Shift()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # --- the line
    monkeypatch.setitem(presets.STAGE_KINDS, "test-shift", presets.KindEntry("vectors that are added"))


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_a_kind_is_a_file_and_a_line(shift, tiny_settings, tmp_path):
    asked = {**tiny_settings, "stage_kind": "test-shift", "out": str(tmp_path / "run"), "accept": "always"}
    run = run_cascade(make_settings({**asked, "num_stages": 2, "cache_dir": str(tmp_path / "cache")})).path
    results = read_json(run / "results.json")
    assert [stage["trainable_parameters"] for stage in results["stages"]] == [2 * 32 + 32] * 2
    assert results["final"]["all_token_val_ppl"] < results["base"]["val_ppl"]
    model = CascadeForCausalLM.from_pretrained(run)
    assert isinstance(model.stages[1], ShiftStage)
    ids = text_ids(4, 33)
    rows = evaluate_cascade(model, Sequences.from_blocks(ids), count_flops=False)["rows"]
    assert rows[0]["perplexity"] != rows[2]["perplexity"]
    assert model.generate(ids[:, :8], max_new_tokens=4, do_sample=False).shape == (4, 12)
    model.save_pretrained(tmp_path / "saved")
    assert "2 stage(s), vectors that are added" in (tmp_path / "saved" / "README.md").read_text()
    torch.testing.assert_close(CascadeForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_a_kind_that_there_is_not():
    with pytest.raises(InputError, match="stage_kind: 'sideways'; must be one of append, second-look"):
        get_kind("sideways")
    with pytest.raises(InputError, match="stage_kind: 'test-shift'; must be one of append, second-look"):
        make_settings({"stage_kind": "test-shift"})


@pytest.mark.parametrize("name", presets.STAGE_KINDS)
def test_every_kind_keeps_its_name(name, tiny_base):
    from transformers import AutoConfig

    kind = get_kind(name)
    asked = make_settings({"stage_kind": name, "layers_per_stage": 2})
    shape = kind.config(asked, AutoConfig.from_pretrained(tiny_base))
    assert kind.name == shape.kind == name
    stage = kind.empty(shape, torch.zeros(300, 32))
    assert all(isinstance(layer, kind.layer_class) for layer in stage.layers)
    assert stage.parameter_count() == kind.counts(shape).parameters()
    assert (shape.kv_shape is not None) == kind.attends
