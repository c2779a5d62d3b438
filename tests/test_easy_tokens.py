"""Easy tokens that go through a stage without gradients while it is trained (``--easy-tokens forward``)."""

import json

import pytest
import torch
from second_look_cases import CPU, KIND, LAYERS, adapter_stage, copied_stage, draw_updates, passed_by_base

from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.losses import linear_cross_entropy
from cascade_fast.selection import EVERY_TOKEN
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import hardest_of_store
from cascade_fast.stages.second_look import SecondLookStage

LOOK = {"stage_kind": "second-look", "layers_per_stage": LAYERS, "num_stages": 1}
LORA = {"adapter": "lora", "lora_rank": 3}
RAGGED = {"train_blocks": None, "val_blocks": None, "train_tokens": 600, "val_tokens": 200}


def loss_and_gradients(stage: SecondLookStage, tokens, picked) -> tuple[torch.Tensor, list[torch.Tensor]]:
    pack, label_K = tokens.batch(picked, CPU)
    loss = linear_cross_entropy(stage(pack)[1], stage.head, label_K)
    trained = [p for p in stage.parameters() if p.requires_grad]
    return loss, list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["copy", "lora"])
@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["blocks", "ragged"])
def test_hard_tokens_see_the_stages_own_keys_and_values_of_easy_ones(tiny_settings, tmp_path, adapter, sizes):
    """The oracle is another way to the same: all keys and values of the stage made first, as constants, and the hard
    tokens' own laid over them."""
    settings = {**tiny_settings, **LOOK, **adapter, **sizes, "kv": "recompute"}
    base, _, passed = passed_by_base(settings, tmp_path)
    as_it_begins = adapter_stage(settings, base, passed) if adapter else copied_stage(base, passed)
    stage = draw_updates(as_it_begins)
    store = passed.stores["train"]
    index_K = hardest_of_store(store, 0.4).index_K
    picked = torch.tensor([2, 0, 1])
    easy = KIND.tokens([store], index_K, easy_too=True)
    assert easy.batch(picked, CPU)[0].easy is not None
    oracle = KIND.tokens([store], index_K, stage.keys_and_values)
    loss, gradients = loss_and_gradients(stage, easy, picked)
    expected, expected_gradients = loss_and_gradients(stage, oracle, picked)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_hard_tokens_come_out_as_in_the_plain_model(tiny_settings, tmp_path):
    base, _, passed = passed_by_base({**tiny_settings, **LOOK}, tmp_path)
    stage, store = copied_stage(base, passed, noise=0.05), passed.stores["train"]
    index_K = hardest_of_store(store, 0.4).index_K
    some, everyone = torch.arange(3), torch.arange(len(store))
    with torch.no_grad():
        of_hard = stage(KIND.tokens([store], index_K, easy_too=True).batch(some, CPU)[0])[0]
        of_all = stage(KIND.tokens([store], everyone).batch(some, CPU)[0])[0]
    rows_K = KIND.tokens([store], index_K).rows(some)
    torch.testing.assert_close(of_hard, of_all[rows_K], rtol=1e-5, atol=1e-5)


def test_a_sequence_without_easy_tokens(tiny_settings, tmp_path):
    base, _, passed = passed_by_base({**tiny_settings, **LOOK}, tmp_path)
    stage, store = copied_stage(base, passed, noise=0.05), passed.stores["train"]
    everyone = torch.arange(len(store))
    pack, _ = KIND.tokens([store], everyone, easy_too=True).batch(torch.tensor([1]), CPU)
    plain, _ = KIND.tokens([store], everyone).batch(torch.tensor([1]), CPU)
    assert pack.easy is None
    with torch.no_grad():
        assert torch.equal(stage(pack)[0], stage(plain)[0])


def test_a_run(tiny_settings, tmp_path):
    """It keeps no keys and values, every token enters, and validation in training is that of the plain model."""
    asked = {
        **tiny_settings,
        **LOOK,
        **LORA,
        "easy_tokens": "forward",
        "hard_ratio": 0.4,
        "lr": 1e-2,
        "accept": "always",
        "cache_dir": str(tmp_path / "cache"),
    }
    folder = run_cascade(make_settings({**asked, "out": str(tmp_path / "run")}))
    results = json.loads((folder.path / "results.json").read_text())
    (stage,), final = results["stages"], results["final"]
    assert stage["exit_threshold"] == EVERY_TOKEN
    assert stage["train_hard"] < stage["train_total"]
    assert final["exit_share"] == {"base": 0.0, "stage_1": 1.0}
    assert final["merged"]["all_token_val_ppl"] == pytest.approx(stage["best_val_ppl"], rel=1e-5)
    kept = {path.name for path in (tmp_path / "cache").rglob("*.bin")}
    assert "hidden.bin" in kept
    assert "kv.bin" not in kept
    again = run_cascade(make_settings({**asked, "out": str(tmp_path / "again")}))
    assert json.loads((again.path / "results.json").read_text())["final"]["merged"] == final["merged"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 2}, "num_stages: 2; must be 1 with easy_tokens forward"),
        ({"kv": "store"}, "kv: 'store'; must be auto or recompute with easy_tokens forward"),
        ({"stage_kind": "append"}, "easy_tokens: 'forward'; stages of kind append"),
        ({"easy_tokens": "train"}, "easy_tokens: 'train'; must be one of skip, forward"),
    ],
)
def test_what_does_not_go_with_it(tiny_settings, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run_cascade(make_settings({**tiny_settings, **LOOK, "easy_tokens": "forward", "out": str(tmp_path), **changes}))
    assert not any(tmp_path.iterdir())
