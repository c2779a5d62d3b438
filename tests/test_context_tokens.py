"""Tokens without a label in the model and in what measures it: read by the base, by no stage, and counted by nobody."""

import json
import math

import pytest
import torch
from conftest import byte_tokenizer, english_texts, text_ids
from torch import nn
from transformers.utils.generic import find_labels

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.model import find_base
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.splits import SplitSequences, Usage
from cascade_fast.criteria import get_criterion
from cascade_fast.model.measuring import evaluate_cascade, measure, sweep_threshold
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits
from cascade_fast.stages.kind import base_needs

CPU = torch.device("cpu")
LENGTHS = [9, 32, 21, 9, 1, 30, 17, 26, 12, 32]
BASE_LAYERS, STAGE_LAYERS = 3, 2


@pytest.fixture(params=["warm", "seed", "look"])
def run(request, tiny_runs):
    return tiny_runs[request.param]


@pytest.fixture
def model(run):
    return CascadeForCausalLM.from_pretrained(run).requires_grad_(False)


def _text(seed: int = 0) -> Sequences:
    """Ragged, about half of it labelled, the last token of some of them not."""
    generator = torch.Generator().manual_seed(seed)
    ids = [byte_tokenizer()(t)["input_ids"][: n + 1] for t, n in zip(english_texts(10, 40, 900), LENGTHS, strict=True)]
    labelled = [torch.rand(n, generator=generator) < 0.5 for n in LENGTHS]
    for marks in labelled:
        marks[0] = True
    return Sequences.from_lists(ids, labelled)


def _labels(sequences: Sequences, number: int) -> torch.Tensor:
    """As transformers has them, of the ids without the last."""
    return torch.cat([torch.tensor([-100]), _shifted(sequences, number)[:-1]])[None]


def _shifted(sequences: Sequences, number: int) -> torch.Tensor:
    return sequences.ids(number)[1:].long().masked_fill(~sequences.labelled(number), -100)


def _rows(module) -> list[int]:
    rows: list[int] = []
    module.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[:-1].numel()))
    return rows


# --- measured as in training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 64, 1024])
def test_labelled_tokens_have_the_losses_and_exits_of_evaluate_exits(run, model, batch_tokens, tmp_path):
    settings = make_settings(json.loads((run / "config.json").read_text())["settings"])
    base, sequences, compute = find_base(settings), _text(), Compute(CPU, torch.float32)
    splits = SplitSequences(dict.fromkeys(("train", "val", "test"), sequences), "test", Usage())
    passed = base_pass(base, splits, settings, base_needs(settings), compute, tmp_path)
    stages = [
        ExitStage.load(run / f"stages/{n}", model.config.stage_config(n), threshold, passed.head_VD)
        for n, threshold in enumerate(model.config.thresholds, 1)
    ]
    how = {"criterion": get_criterion(settings.criterion), "compute": compute}
    expected = evaluate_exits(stages, passed.stores["val"], **how)
    measured = measure(model, sequences, model.config.thresholds, batch_tokens=batch_tokens)
    assert set(measured.exit_N.tolist()) == {0, 1, 2}
    assert torch.equal(measured.exit_N, expected.exit_N)
    assert torch.equal(measured.sequence_N, expected.sequence_N.long())
    torch.testing.assert_close(measured.loss_N, expected.loss_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured.score_NE, expected.score_NP, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert len(measured.loss_N) == sequences.labels < measured.tokens == sum(LENGTHS)
    # Padding and context go through no layer of a stage, and padding's are not counted of the base.
    stage_layers = STAGE_LAYERS * int(expected.exit_N.sum())
    assert measured.layers == BASE_LAYERS * sum(LENGTHS) + stage_layers


def test_flops_are_those_of_the_sequences_one_by_one(model):
    sequences = _text()
    found = measure(model, sequences, model.config.thresholds, count_flops=True)
    alone = [
        measure(
            model,
            Sequences.from_lists([sequences.ids(n)], [sequences.labelled(n)]),
            model.config.thresholds,
            count_flops=True,
        )
        for n in range(len(sequences))
    ]
    total = sum(one.flops for one in alone)
    if model.config.attends:  # sequences of one length share a pack, as wide as the most hard tokens of one
        assert total <= found.flops < 1.01 * total
    else:
        assert found.flops == total
    assert found.row(2)["flops_per_token"] == found.flops / sum(LENGTHS)


def test_the_rows_are_of_labelled_tokens(model):
    sequences = _text()
    found = evaluate_cascade(model, sequences)
    for row in found["rows"]:
        assert sum(row["exit_share"]) == pytest.approx(1)
        through = sum(n * share for n, share in enumerate(row["exit_share"])) * sequences.labels / sum(LENGTHS)
        assert row["layers_per_token"] == pytest.approx(BASE_LAYERS + STAGE_LAYERS * through)
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    first = found["exits"][0]
    assert first["easy_tokens"] + first["hard_tokens"] == sequences.labels
    entered = [1 - row["exit_share"][0] for row in sweep_threshold(model, sequences, points=3) if not row["trained"]]
    assert entered == pytest.approx([0, 0.5, 1], abs=0.01)


# --- labels in the forward pass --------------------------------------------------------------------------------------


def test_context_enters_no_stage_and_has_the_base_s_logits(model):
    ids, labels = text_ids(), text_ids().masked_fill(torch.rand(4, 24) < 0.5, -100)
    rows = [_rows(stage.layers[0]) for stage in model.stages]
    output = model(ids, labels=labels, output_exits=True)
    context = labels[:, 1:] == -100
    assert torch.equal(output.exits[:, :-1] == -1, context)
    assert (output.exits[:, -1] >= 0).all()  # nobody knows what follows on the last
    assert output.scores[:, :-1][context].isnan().all()
    assert [sum(r) for r in rows] == [int((output.exits >= n).sum()) for n in (1, 2)]
    assert sum(rows[1]) > 0
    base = model.base(ids).logits
    torch.testing.assert_close(output.logits[:, :-1][context], base[:, :-1][context], rtol=1e-5, atol=1e-5)
    expected = nn.functional.cross_entropy(output.logits[:, :-1][~context], labels[:, 1:][~context])
    torch.testing.assert_close(output.loss, expected)
    if not model.config.attends:  # then context is all that labels change
        without = model(ids, output_exits=True)
        here = output.exits >= 0
        assert torch.equal(output.exits[here], without.exits[here])
        torch.testing.assert_close(output.logits[here], without.logits[here], rtol=1e-5, atol=1e-5)


def test_labels_for_every_token_change_nothing(model):
    ids = text_ids()
    without, output = model(ids, output_exits=True), model(ids, labels=ids, output_exits=True)
    assert torch.equal(output.logits, without.logits)
    assert torch.equal(output.exits, without.exits)
    assert without.loss is None


def test_no_label_at_all_runs_no_stage(model):
    ids = text_ids()
    rows = [_rows(stage.layers[0]) for stage in model.stages]
    everywhere = torch.full_like(ids, -100)
    output = model(ids, shift_labels=everywhere, thresholds=[math.inf] * 2, output_exits=True)
    assert rows == [[], []]
    assert (output.exits == -1).all()
    assert torch.equal(output.logits, model.base(ids).logits)
    assert output.loss is None
    # Of ``labels`` alone the last positions may enter; the mean of no loss is NaN, as transformers has it.
    output = model(ids, labels=everywhere, thresholds=[math.inf] * 2, output_exits=True)
    assert rows == [[4], [4]]
    assert output.exits.unique().tolist() == [-1, 2]
    assert output.loss.isnan()
    assert model(ids, labels=everywhere, num_items_in_batch=8).loss == 0


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([20, 0, 7])], ids=["1", "5", "indices"])
def test_labels_with_logits_to_keep(model, keep):
    ids = text_ids()
    labels = ids.masked_fill(torch.arange(24) % 3 == 2, -100)
    shift_labels = torch.cat([labels[:, 1:], ids[:, :1]], 1)  # the last position has one, too
    for given, of_each in (
        ({"labels": labels}, torch.cat([labels[:, 1:], torch.full((4, 1), -100)], 1)),
        ({"labels": labels, "shift_labels": shift_labels}, shift_labels),
    ):
        whole = model(ids, **given, output_exits=True)
        output = model(ids, **given, logits_to_keep=keep, output_exits=True)
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        assert torch.equal(output.exits, whole.exits[:, kept])
        torch.testing.assert_close(output.logits, whole.logits[:, kept], rtol=1e-5, atol=1e-5)
        expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), of_each[:, kept].flatten())
        torch.testing.assert_close(output.loss, expected, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_with_padding(model, side):
    """Each row is what it is alone, wherever its padding."""
    sequences = _text()
    longest = sequences.longest
    ids, mask = torch.zeros(10, longest, dtype=torch.int64), torch.zeros(10, longest, dtype=torch.int64)
    shift_labels, places = torch.full_like(ids, -100), []
    for row, n in enumerate(sequences.length_B.tolist()):
        here = slice(0, n) if side == "right" else slice(longest - n, longest)
        ids[row, here], mask[row, here] = sequences.ids(row)[:-1].long(), 1
        shift_labels[row, here] = _shifted(sequences, row)
        places.append(here)
    how = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "output_exits": True}
    output = model(ids, shift_labels=shift_labels, **how)
    assert torch.equal(output.exits == -1, shift_labels == -100)
    for row, here in enumerate(places):
        one = model(ids[row, here][None], shift_labels=shift_labels[row, here][None], output_exits=True)
        assert torch.equal(one.exits[0], output.exits[row, here])
        torch.testing.assert_close(one.logits[0], output.logits[row, here], rtol=1e-4, atol=1e-4)
        by_labels = model(ids[row, here][None], labels=_labels(sequences, row), output_exits=True)
        assert torch.equal(by_labels.exits[0, :-1], one.exits[0, :-1])
        torch.testing.assert_close(by_labels.logits[0, :-1], one.logits[0, :-1], rtol=1e-4, atol=1e-4)


def test_labels_train_the_stages_on_labelled_tokens_only(model):
    model.requires_grad_(True)
    ids, labels = text_ids(), torch.full((4, 24), -100)
    labels[0, 9] = 5
    rows = _rows(model.stages[1].layers[0])
    model(ids, labels=labels, thresholds=[math.inf] * 2).loss.backward()
    assert rows == [5]  # the one before the label, and the last of each sequence
    for layer in (model.stages[1].layers[0], model.base.model.layers[0]):
        grad = layer.mlp.up_proj.weight.grad
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_labels_of_another_shape_are_named(model):
    ids = text_ids()
    with pytest.raises(ValueError, match=r"^labels: shape \(4, 5\); must have that of input_ids, \(4, 24\)"):
        model(ids, labels=ids[:, -5:], logits_to_keep=5)
    with pytest.raises(ValueError, match=r"^shift_labels: shape \(4, 23\); must have"):
        model(ids, shift_labels=ids[:, 1:])


def test_trainers_look_for_labels_alone():
    """transformers' ``Trainer`` evaluates a batch only if it has every argument with "label" in its name."""
    assert find_labels(CascadeForCausalLM) == ["labels"]
