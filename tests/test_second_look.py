"""A second look: what it must equal, exactly or to float32's rounding."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from second_look_cases import CPU, HOW, LAYERS, copied_stage, passed_by_base, save_family_base
from test_stage import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from cascade_fast.base.cache_name import cache_of, with_cache
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import run_cascade
from cascade_fast.runtime.compute import Compute
from cascade_fast.selection import select_hardest
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage, advance, evaluate_exits
from cascade_fast.stages.second_look import SecondLookConfig, SecondLookStage
from cascade_fast.stages.tokens import SequenceTokens
from cascade_fast.training import trainer
from cascade_fast.training.trainer import epoch_order, validation_loss

# --- what it equals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard_ratio", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_cascade_is_the_base(tiny_settings, tmp_path, family, hard_ratio):
    base_folder = save_family_base(tmp_path / "base", family)
    look = {"stage_kind": "second-look", "layers_per_stage": LAYERS, "store_dtype": "float32"}
    base, _, passed = passed_by_base({**tiny_settings, "base": str(base_folder), **look}, tmp_path)
    val = passed.stores["val"]
    threshold = select_hardest(val["score"], hard_ratio).threshold
    evaluation = evaluate_exits([ExitStage(copied_stage(base, passed), threshold)], val, **HOW)
    torch.testing.assert_close(evaluation.loss_N, val["loss"], rtol=1e-5, atol=1e-5)
    assert evaluation.shares(1)["stage_1"] == pytest.approx(hard_ratio, abs=0.01)


def test_nothing_hard_is_the_base_exactly(look_settings, tmp_path):
    base, _, passed = passed_by_base(look_settings, tmp_path)
    entries = [ExitStage(copied_stage(base, passed, noise=0.2), -math.inf)] * 2
    evaluation = evaluate_exits(entries, passed.stores["val"], **HOW)
    assert torch.equal(evaluation.loss_N, passed.stores["val"]["loss"])


def _renamed(base, stage: SecondLookStage) -> dict[str, torch.Tensor]:
    """The stage's weights under the names they have in transformers' whole model."""
    first = base.layers - LAYERS
    names = {n: n.split(".", 2) for n in stage.state_dict()}
    return {
        f"model.layers.{int(p[1]) + first}.{p[2]}" if n.startswith("layers") else f"model.{n}": stage.state_dict()[n]
        for n, p in names.items()
    }


@pytest.mark.parametrize("hard_ratio", [0.05, 0.5, 1.0])
def test_a_changed_stage_is_what_it_is_on_paper(look_settings, tmp_path, hard_ratio):
    """Token by token with transformers: a cache of the base's keys and values, but the stage's where hard."""
    base, blocks, passed = passed_by_base(look_settings, tmp_path)
    val, stage = passed.stores["val"], copied_stage(base, passed, noise=0.1)
    hard = select_hardest(val["score"], hard_ratio)
    evaluation = evaluate_exits([ExitStage(stage, hard.threshold)], val, **HOW)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    changed = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    changed.load_state_dict({**changed.state_dict(), **_renamed(base, stage)})
    expected_N = val["loss"].clone()
    with torch.no_grad():
        for block in range(3):
            ids = blocks.splits["val"].blocks()[block].long()
            kept = [(layer.keys, layer.values) for layer in cache_of(model(ids[None, :-1], use_cache=True)).layers]
            rows = slice(block * 32, (block + 1) * 32)
            for position in (hard.index_K[(hard.index_K // 32) == block] % 32).tolist():
                cache = DynamicCache()
                for number, (keys, values) in enumerate(kept):
                    cache.update(keys[:, :, :position], values[:, :, :position], number)
                out = changed(ids[position].view(1, 1), **with_cache(cache), use_cache=True)
                expected_N[rows][position] = nn.functional.cross_entropy(out.logits[0], ids[position + 1].view(1))
                for (keys, values), layer in zip(kept, cache.layers, strict=True):
                    keys[:, :, position], values[:, :, position] = layer.keys[:, :, -1], layer.values[:, :, -1]
    torch.testing.assert_close(evaluation.loss_N[:96], expected_N[:96], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(evaluation.loss_N[:96], val["loss"][:96], atol=1e-2)


def test_everything_hard_is_fine_tuning_the_last_layers(look_settings, tmp_path, monkeypatch):
    """r = 1: the losses of 20 steps are those of a plain loop over transformers' model, the rest of it frozen."""
    real, losses = trainer.linear_cross_entropy, []

    def record(*args, **kwargs):
        loss = real(*args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(trainer, "linear_cross_entropy", record)
    changes = {
        "hard_ratio": 1.0,
        "num_stages": 1,
        "epochs": 1,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "lr": 1e-3,
        "accept": "always",
    }
    run = run_cascade(make_settings({**look_settings, "out": str(tmp_path / "run"), **changes}))
    settings = make_settings({**look_settings, **changes})
    base = find_base(settings)
    ids = load_sequences(settings, base.tokenizer()).splits["train"].blocks().long()
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).requires_grad_(False)
    trained = [p for part in (*model.model.layers[-LAYERS:], model.model.norm) for p in part.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=settings.weight_decay, fused=True)
    expected = []
    for blocks in epoch_order(40, seed=7, stage=1, epoch=1).split(2):  # 64 tokens
        logits = model(ids[blocks, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[blocks, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0]
    weights = load_file(run.path / "stages/1/model.safetensors")
    stage_names = {name.removeprefix("model.") for name in _renamed_from_file(base, weights)}
    assert stage_names <= set(model.model.state_dict())


def _renamed_from_file(base, weights) -> set[str]:
    first = base.layers - LAYERS
    return {
        f"model.layers.{int(n.split('.')[1]) + first}.{n.split('.', 2)[2]}" if n.startswith("layers") else f"model.{n}"
        for n in weights
    }


@pytest.fixture
def hard_tokens(look_settings, tmp_path):
    base, _, passed = passed_by_base(look_settings, tmp_path)
    train = passed.stores["train"]
    return copied_stage(base, passed, noise=0.1), SequenceTokens([train], select_hardest(train["score"], 0.4).index_K)


def test_a_batch_is_its_sequences_one_by_one(hard_tokens):
    stage, tokens = hard_tokens
    whole = stage(tokens.batch(torch.arange(tokens.units), CPU)[0])
    alone = [stage(tokens.batch(torch.tensor([unit]), CPU)[0]) for unit in range(tokens.units)]
    for mine, expected in zip(whole, map(torch.cat, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "positions",
    [
        {0: [31]},
        {0: range(32)},
        {0: [31], 1: range(32), 2: [0]},
        {0: [0, 31], 2: range(5, 9), 5: [7]},  # sequences 1, 3 and 4 have none
    ],
    ids=["only the last", "all", "one, all, one", "some have none"],
)
def test_padding_changes_nothing(look_settings, tmp_path, positions):
    """Outputs and gradients of a pack whose sequences have different numbers of hard tokens, against one by one."""
    base, _, passed = passed_by_base(look_settings, tmp_path)
    stage = copied_stage(base, passed, noise=0.1)
    index_K = torch.tensor([32 * sequence + p for sequence, hard in positions.items() for p in hard])
    tokens = SequenceTokens([passed.stores["train"]], index_K)
    assert tokens.units == len(positions)

    def gradients(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        stage.zero_grad()
        for picked in parts:
            pack, label = tokens.batch(picked, CPU)
            nn.functional.cross_entropy(stage(pack)[1] @ stage.head.T, label, reduction="sum").backward()
        return [p.grad for p in stage.parameters()]

    together = gradients([torch.arange(tokens.units)])
    for mine, expected in zip(together, gradients(list(torch.arange(tokens.units).split(1))), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        assert mine.isfinite().all()


def test_the_order_of_the_sequences_does_not_matter(hard_tokens):
    stage, tokens = hard_tokens
    order = torch.randperm(tokens.units)
    (pack, label), (shuffled, shuffled_label) = (tokens.batch(p, CPU) for p in (torch.arange(tokens.units), order))
    place = torch.cat([torch.arange(tokens.start_U[u], tokens.start_U[u] + tokens.count_U[u]) for u in order])
    assert torch.equal(label[place], shuffled_label)
    torch.testing.assert_close(stage(pack)[1][place], stage(shuffled)[1], rtol=1e-5, atol=1e-5)
    assert validation_loss(stage, tokens, Compute(CPU, torch.float32)) == pytest.approx(
        nn.functional.cross_entropy(stage(pack)[1] @ stage.head.T, label).item(), rel=1e-5
    )


def test_gradients_flow_through_the_overlay(hard_tokens):
    """An early hard token's keys and values take part in a later one's loss."""
    stage, tokens = hard_tokens
    pack, label = tokens.batch(torch.arange(4), CPU)
    hidden_KD = pack.hidden_KD.clone().requires_grad_()
    _, normed = stage(dataclasses.replace(pack, hidden_KD=hidden_KD))
    last = int(tokens.count_U[0]) - 1  # the last hard token of the first sequence
    nn.functional.cross_entropy(normed[last : last + 1] @ stage.head.T, label[last : last + 1]).backward()
    of_its_sequence, of_others = hidden_KD.grad[: last + 1], hidden_KD.grad[last + 1 :]
    assert (of_its_sequence.abs().sum(1) > 0).all()
    assert not of_others.any()
    assert stage.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    assert stage.head.grad is None


def test_a_token_cannot_see_what_comes_after_it(hard_tokens):
    stage, tokens = hard_tokens
    pack, _ = tokens.batch(torch.tensor([3]), CPU)
    place = len(pack.position_K) // 2
    position = int(pack.position_K[place])
    changed_kv, changed_hidden = pack.kv_BSL2GE.clone(), pack.hidden_KD.clone()
    changed_kv[:, position + 1 :] += 100.0
    changed_hidden[place + 1 :] += 1.0
    one, two = stage(pack)[1], stage(dataclasses.replace(pack, hidden_KD=changed_hidden, kv_BSL2GE=changed_kv))[1]
    assert torch.equal(one[: place + 1], two[: place + 1])
    assert not torch.allclose(one[place + 1 :], two[place + 1 :])


def test_a_third_look_attends_to_what_the_second_left(look_settings, tmp_path):
    """Evaluation in memory, the stores on disk, and the definition agree for two stages."""
    base, _, passed = passed_by_base(look_settings, tmp_path)
    val = passed.stores["val"]
    first, second = copied_stage(base, passed, noise=0.1), copied_stage(base, passed, noise=0.1, seed=1)
    hard = select_hardest(val["score"], 0.6)
    tokens = SequenceTokens([val], hard.index_K)
    arrays = advance(first, tokens, torch.arange(tokens.units), **HOW)
    assert torch.equal(arrays["hidden"], val.hidden[hard.index_K])  # it enters where the second look did
    left = HiddenStore(tmp_path, arrays, {})
    again = select_hardest(left["score"], 0.5)
    entries = [ExitStage(first, hard.threshold), ExitStage(second, again.threshold)]
    evaluation = evaluate_exits(entries, val, **HOW)
    assert torch.bincount(evaluation.exit_N).tolist() == [
        384 - len(left),
        len(left) - len(again.index_K),
        len(again.index_K),
    ]
    # By hand: the base's keys and values, the first stage's over them, and then the second stage over all that.
    row_J = hard.index_K[again.index_K]
    kv_N = val["kv"].clone()
    kv_N[hard.index_K] = arrays["kv"]
    by_hand = SequenceTokens([HiddenStore(tmp_path, {**val.arrays, "kv": kv_N}, {})], row_J)
    pack, label = by_hand.batch(torch.arange(by_hand.units), CPU)
    expected = nn.functional.cross_entropy(second(pack)[1] @ second.head.T, label, reduction="none")
    torch.testing.assert_close(evaluation.loss_N[row_J], expected, rtol=1e-5, atol=1e-5)
    two_stores = SequenceTokens([val, left], again.index_K).batch(torch.arange(by_hand.units), CPU)[0]
    torch.testing.assert_close(two_stores.kv_BSL2GE, pack.kv_BSL2GE)
    picked = torch.tensor([4, 1])
    some = SequenceTokens([val, left], again.index_K).batch(picked, CPU)[0]
    torch.testing.assert_close(some.kv_BSL2GE, pack.kv_BSL2GE[picked])


def test_all_layers_may_look_again(look_settings, tmp_path):
    """L = the base's layers: a hard token re-enters at its embedding."""
    _, _, passed = passed_by_base(look_settings, tmp_path, layers_per_stage=3)
    base = find_base(make_settings(look_settings))
    shape = SecondLookConfig.from_base(base.config, layers=3)
    stage = SecondLookStage(shape, head_VD=passed.head_VD, weights={**passed.layers, "norm.weight": passed.norm_D})
    val = passed.stores["val"]
    assert shape.entry_layer == 0
    evaluation = evaluate_exits([ExitStage(stage.eval(), 0.0)], val, **HOW)
    torch.testing.assert_close(evaluation.loss_N, val["loss"], rtol=1e-5, atol=1e-5)
