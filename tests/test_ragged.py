"""Sequences of many lengths, some tokens without a label: all together as one at a time, and no token counts that has
no label."""

import json

import pytest
import torch
from conftest import byte_tokenizer, english_texts
from safetensors.torch import load_file
from second_look_cases import HOW, copied_stage
from torch import nn
from transformers import AutoModelForCausalLM

from cascade_fast import inputs
from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import NO_LABEL, Sequences, TokenText
from cascade_fast.base.splits import split_texts
from cascade_fast.cascade import run_cascade
from cascade_fast.criteria import token_entropy
from cascade_fast.settings import make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.exits import ExitStage, evaluate_exits, hardest_of_store
from cascade_fast.stages.kind import base_needs, get_kind
from cascade_fast.stages.tokens import PackPlaces
from cascade_fast.training import stage_trainer
from cascade_fast.training.finetune import WholeModel, WholeSequences

TOKENIZER = byte_tokenizer()
SIZES = {"train_blocks": None, "val_blocks": None, "train_tokens": 900, "val_tokens": 300, "test_tokens": 200}


def ragged_texts(count: int = 120, seed: int = 0) -> list[TokenText]:
    """Texts of 2 to 79 tokens; of each a stretch at the beginning has no label."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for text in english_texts(count, 80):
        length, prompt = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 80), (1, 20)))
        ids = TOKENIZER(text)["input_ids"][:length]
        texts.append(TokenText(ids, [position >= prompt for position in range(len(ids))]))
    return texts


@pytest.fixture
def ragged(tiny_settings, monkeypatch):
    """Settings of a run on such texts."""
    monkeypatch.setattr(inputs, "load_sequences", lambda settings, _: split_texts(ragged_texts(), settings))
    return {**tiny_settings, **SIZES, "store_dtype": "float32", "accept": "always", "hard_ratio": 0.5}


def _pass(settings, tmp_path, **changes):
    settings = make_settings({**settings, **changes})
    base = find_base(settings)
    sequences = split_texts(ragged_texts(), settings)
    passed = base_pass(base, sequences, settings, base_needs(settings), HOW["compute"], tmp_path / "cache")
    return base, sequences, passed


def _rows(store: HiddenStore, number: int) -> slice:
    first, end = torch.searchsorted(store["sequence"], torch.tensor([number, number + 1])).tolist()
    return slice(first, end)


KINDS = {"append": {}, "second-look": {"stage_kind": "second-look", "layers_per_stage": 2}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["entropy", "cosine"])
def test_the_base_pass_is_that_of_each_sequence_by_itself(ragged, tmp_path, kind, criterion):
    base, sequences, passed = _pass(ragged, tmp_path, criterion=criterion, **KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    read = []
    begins = model.model.norm if kind == "append" else model.model.layers[-2]
    begins.register_forward_pre_hook(lambda _m, args: read.append(args[0][0]))
    for split, of in sequences.splits.items():
        store = passed.stores[split]
        assert len(store) == (of.labels if kind == "append" else of.tokens)
        assert len(store.labelled_index()) == of.labels < of.tokens
        assert len(of.length_B.unique()) >= 4
        for number in range(len(of)):
            ids, labelled_S, rows = of.ids(number).long(), of.labelled(number), _rows(store, number)
            with torch.no_grad():
                out = model(ids[None, :-1], output_hidden_states=True, use_cache=True)
            kept_S = labelled_S if kind == "append" else torch.ones_like(labelled_S)
            torch.testing.assert_close(store.hidden[rows], read.pop()[kept_S], rtol=1e-4, atol=1e-4)
            assert torch.equal(store["position"][rows], kept_S.nonzero().squeeze(1).int())
            label_S = ids[1:].masked_fill(~labelled_S, NO_LABEL)
            assert torch.equal(store["label"][rows], label_S[kept_S])
            embedded_SD, last_SD = out.hidden_states[0][0], out.hidden_states[-1][0]
            score_S = torch.cosine_similarity(embedded_SD, last_SD)
            score_S = -token_entropy(out.logits[0]) if criterion == "entropy" else score_S
            expected = score_S.masked_fill(~labelled_S, torch.nan)[kept_S]
            torch.testing.assert_close(store["score"][rows], expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            if "loss" in store:
                loss_S = nn.functional.cross_entropy(out.logits[0], ids[1:], reduction="none")
                expected = loss_S.masked_fill(~labelled_S, torch.nan)[kept_S]
                torch.testing.assert_close(store["loss"][rows], expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_interrupted_base_pass_goes_on_to_the_same_bits(ragged, tmp_path, monkeypatch):
    from cascade_fast.base import fill_store as module

    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 64)
    monkeypatch.setattr(module, "SAVE_PROGRESS_SECONDS", 0.0)
    _, _, whole = _pass(ragged, tmp_path / "a", **KINDS["second-look"])
    real, appended = HiddenStore.append, []

    def append(self, arrays):
        if len(appended) == 7:
            raise KeyboardInterrupt
        appended.append(1)
        real(self, arrays)

    monkeypatch.setattr(HiddenStore, "append", append)
    with pytest.raises(KeyboardInterrupt):
        _pass(ragged, tmp_path / "b", **KINDS["second-look"])
    monkeypatch.setattr(HiddenStore, "append", real)
    _, _, resumed = _pass(ragged, tmp_path / "b", **KINDS["second-look"])
    for split, store in whole.stores.items():
        for name, array in store.arrays.items():
            assert torch.equal(array.view(torch.uint8), resumed.stores[split][name].view(torch.uint8)), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_packed_batch_is_its_sequences_one_by_one(ragged, tmp_path, recompute):
    changes = {**KINDS["second-look"], "kv": "recompute" if recompute else "store", "dtype": "float32"}
    base, _, passed = _pass(ragged, tmp_path, **changes)
    settings = make_settings({**ragged, **changes})
    kind, store = get_kind("second-look"), passed.stores["train"]
    made = kind.recompute(settings, base.config, passed, HOW["compute"])
    assert (made is not None) == recompute
    tokens = kind.tokens([store], hardest_of_store(store, 0.5).index_K, made)
    stage = copied_stage(base, passed, noise=0.1).train()
    units = torch.arange(tokens.units)[torch.randperm(tokens.units, generator=torch.Generator().manual_seed(1))]
    pack, label_K = tokens.batch(units, torch.device("cpu"))
    assert pack.kv_BSL2GE.shape[0] < len(units)  # short ones share rows
    assert len(label_K) == len(tokens) == tokens.count(units)

    def run(pack, label_K):
        left = []
        normed_KD = stage(pack, left)[1]
        loss = nn.functional.cross_entropy(normed_KD @ passed.head_VD.T, label_K, reduction="sum")
        return normed_KD.detach(), torch.stack(left, 1).detach(), loss

    normed_KD, left_KL2GE, loss = run(pack, label_K)
    loss.backward()
    together = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    done = 0
    for unit in units.split(1):
        alone, labels = tokens.batch(unit, torch.device("cpu"))
        assert torch.equal(labels, label_K[done : done + len(labels)])
        normed, left, part = run(alone, labels)
        part.backward()
        torch.testing.assert_close(normed_KD[done : done + len(labels)], normed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left_KL2GE[done : done + len(labels)], left, rtol=1e-4, atol=1e-4)
        done += len(labels)
    for name, parameter in stage.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m)


def test_places_of_a_pack_do_not_overlap():
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        length_C = torch.randint(1, 33, (int(torch.randint(1, 30, (1,), generator=generator)),), generator=generator)
        places = PackPlaces.from_lengths(length_C)
        taken = places.laid_out(torch.zeros_like(length_C), length_C, fill=-1)
        assert taken.shape == (places.rows, int(length_C.max()))
        assert int((taken >= 0).sum()) == int(length_C.sum())
        assert 2 * int(length_C.sum()) > (places.rows - 1) * places.width  # all rows but one are more than half full
        count_C = torch.minimum(length_C, torch.randint(0, 33, length_C.shape, generator=generator))
        before_C, most = places.counted(count_C)
        slots = [
            (int(r), int(b) + k) for r, b, n in zip(places.row_C, before_C, count_C, strict=True) for k in range(n)
        ]
        assert len(set(slots)) == len(slots)
        assert most == max((slot + 1 for _, slot in slots), default=0)
    equal = PackPlaces.from_lengths(torch.full((5,), 7))
    assert equal.row_C.tolist() == list(range(5))
    assert equal.column_C.tolist() == [0] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_exits_are_those_of_each_sequence_by_itself(ragged, tmp_path, kind):
    base, sequences, passed = _pass(ragged, tmp_path, **KINDS[kind])
    val = passed.stores["val"]
    config = get_kind(kind).config(make_settings({**ragged, **KINDS[kind]}), base.config)
    stages = []
    for seed in (1, 2):
        if kind == "append":
            stage = AppendedStage(config, head_VD=passed.head_VD, norm_D=passed.norm_D, seed=seed)
            with torch.no_grad():
                for parameter in stage.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)
        else:
            stage = copied_stage(base, passed, noise=0.1, seed=seed)
        stages.append(ExitStage(stage.eval(), hardest_of_store(val, 0.6).threshold))
    arrived_K = evaluate_exits(stages, val, **HOW).score_NP[:, 1]
    stages[1] = ExitStage(stages[1].stage, arrived_K.nanmedian().item())
    whole = evaluate_exits(stages, val, **HOW)
    assert set(whole.exit_N.tolist()) == {0, 1, 2}
    assert len(whole.loss_N) == sequences.splits["val"].labels
    done = 0
    for number in range(len(sequences.splits["val"])):
        alone = evaluate_exits(stages, val.part(_rows(val, number)), **HOW)
        here = slice(done, done + len(alone.loss_N))
        assert torch.equal(whole.exit_N[here], alone.exit_N)
        torch.testing.assert_close(whole.loss_N[here], alone.loss_N, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.score_NP[here], alone.score_NP, rtol=1e-4, atol=1e-4, equal_nan=True)
        done += len(alone.loss_N)
    assert done == len(whole.loss_N)
    assert not whole.loss_N.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["entropy", "random"])
def test_a_run_counts_only_tokens_with_a_label(ragged, tmp_path, monkeypatch, kind, criterion):
    seen = []
    real = stage_trainer.StageTrainer.__init__

    def spy(self, stage, train, val, *args, **kwargs):
        for tokens in (train, val):
            _, label_K = tokens.batch(torch.arange(tokens.units), torch.device("cpu"))
            seen.append(label_K)
        real(self, stage, train, val, *args, **kwargs)

    monkeypatch.setattr(stage_trainer.StageTrainer, "__init__", spy)
    run = run_cascade(make_settings({**ragged, **KINDS[kind], "criterion": criterion, "out": str(tmp_path / "run")}))
    results = json.loads((run.path / "results.json").read_text())
    sequences = split_texts(ragged_texts(), make_settings(ragged))
    assert results["tokens"] == {name: of.labels for name, of in sequences.splits.items()}
    assert results["settings"]["train_tokens"] == sequences.splits["train"].tokens
    assert len(seen) == 4
    assert all(bool((label_K >= 0).all()) for label_K in seen)
    first = results["stages"][0]
    assert first["train_total"] == sequences.splits["train"].labels
    assert first["train_hard"] == len(seen[0]) == (first["train_total"] - 1) // 2 + 1
    assert sum(results["final"]["exit_share"].values()) == pytest.approx(1.0)
    heat = json.loads((run.path / "heat_map.json").read_text())["blocks"]
    for number, block in enumerate(heat):
        assert [exit_ is not None for exit_ in block["exits"]] == sequences.splits["val"].labelled(number).tolist()
        assert [loss is not None for loss in block["loss"]] == sequences.splits["val"].labelled(number).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_in_the_middle_ends_with_the_same_weights(ragged, tmp_path, monkeypatch, kind):
    settings = {**ragged, **KINDS[kind], "checkpoint_minutes": 1e-9}
    run_cascade(make_settings({**settings, "out": str(tmp_path / "whole")}))
    real, steps = stage_trainer.StageTrainer.train_step, []

    def train_step(self, picked):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(1)
        return real(self, picked)

    monkeypatch.setattr(stage_trainer.StageTrainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run_cascade(make_settings({**settings, "out": str(tmp_path / "halved")}))
    monkeypatch.setattr(stage_trainer.StageTrainer, "train_step", real)
    run_cascade(make_settings({**settings, "out": str(tmp_path / "halved"), "resume": "auto"}))
    for number in (1, 2):
        one, two = (load_file(tmp_path / name / f"stages/{number}/model.safetensors") for name in ("whole", "halved"))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_full_fine_tune_reads_every_sequence_and_measures_the_labelled(ragged, tmp_path):
    base, sequences, _ = _pass(ragged, tmp_path)
    of = sequences.splits["val"]
    tokens, model = WholeSequences(of), base.load(torch.device("cpu"), torch.float32)
    whole = WholeModel(model)
    assert len(tokens) == of.labels
    assert sum(tokens.count(picked) for picked in tokens.chunks(100)) == of.labels
    total, expected = 0.0, 0.0
    with torch.no_grad():
        for picked in tokens.chunks(100):
            inputs, label_M = tokens.batch(picked, torch.device("cpu"))
            logits = whole(inputs)[1] @ whole.head.T
            total += nn.functional.cross_entropy(logits, label_M, reduction="sum").item()
        for number in range(len(of)):
            ids = of.ids(number).long()
            label_S = ids[1:].masked_fill(~of.labelled(number), NO_LABEL)
            expected += nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], label_S, reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-5)


def test_equal_sequences_in_any_form_are_the_same():
    ids_BT = torch.randint(0, 99, (6, 9), dtype=torch.int32)
    blocks, lists = Sequences.from_blocks(ids_BT), Sequences.from_lists(ids_BT.tolist())
    assert blocks.digest() == lists.digest()
    assert torch.equal(lists.blocks(), ids_BT)
    assert torch.equal(blocks.padded(slice(1, 4)).ids_BT, ids_BT[1:4].long())
