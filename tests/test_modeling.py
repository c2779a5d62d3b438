"""The cascade as a Hugging Face model: its numbers are training's, and skipping changes none of them."""

import json
import math

import pytest
import torch
from conftest import text_ids, tiny_llama_config
from test_stage import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from cascade_fast.base.base_pass import base_pass
from cascade_fast.base.cache_name import cache_of, with_cache
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.criteria import get_criterion
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.compute import Compute
from cascade_fast.settings import make_settings
from cascade_fast.stages.exits import ExitStage, evaluate_exits
from cascade_fast.stages.kind import base_needs
from cascade_fast.stages.stage import StageConfig

CPU = torch.device("cpu")
CLOSED, OPEN = [-math.inf] * 2, [math.inf] * 2
RUNS = ("warm", "seed", "look")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=RUNS)
def run(request, tiny_runs):
    return tiny_runs[request.param]


@pytest.fixture(params=["warm", "seed"])
def appended(request, tiny_runs):
    return tiny_runs[request.param]


@pytest.fixture
def model(run):
    return CascadeForCausalLM.from_pretrained(run)


def _base(run, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(_settings(run)["base"], dtype=dtype)


def _settings(run):
    return json.loads((run / "config.json").read_text())["settings"]


def _blocks(run, split="val"):
    settings = make_settings(_settings(run))
    return load_sequences(settings, find_base(settings).tokenizer()).splits[split].blocks().long()


def _calls(module):
    """Rows of every call of ``module``, counted while it runs."""
    rows: list[int] = []
    module.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[:-1].numel()))
    return rows


# --- the numbers are training's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_loss_over_a_run_s_blocks_is_the_run_s(run, model, split):
    results = json.loads((run / "results.json").read_text())
    blocks = _blocks(run, split)
    with torch.no_grad():
        output = model(blocks[:, :-1], output_exits=True)
    losses = nn.functional.cross_entropy(output.logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert losses.exp().item() == pytest.approx(results["final"][f"all_token_{split}_ppl"], rel=1e-5)
    if split == "val":
        shares = (torch.bincount(output.exits.flatten(), minlength=3) / output.exits.numel()).tolist()
        assert shares == pytest.approx(list(results["final"]["exit_share"].values()))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_has_the_loss_and_exit_of_evaluate_exits(tiny_runs, name, dtype, tmp_path):
    run = tiny_runs[name]
    settings = make_settings(_settings(run))
    base = find_base(settings)
    passed = base_pass(
        base,
        load_sequences(settings, base.tokenizer()),
        settings,
        base_needs(settings),
        Compute(CPU, dtype),
        tmp_path,
    )
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype)
    entries = [
        ExitStage.load(
            run / f"stages/{n}", model.config.stage_config(n), model.config.thresholds[n - 1], passed.head_VD
        )
        for n in (1, 2)
    ]
    how = {"criterion": get_criterion(settings.criterion), "compute": Compute(CPU, dtype)}
    expected = evaluate_exits(entries, passed.stores["val"], **how)
    blocks = _blocks(run)
    with torch.no_grad():
        output = model(blocks[:, :-1], output_exits=True)
    loss = nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), blocks[:, 1:].flatten(), reduction="none")
    same = output.exits.flatten() == expected.exit_N
    assert same.float().mean() == 1.0 if dtype == torch.float32 else same.float().mean() > 0.98
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # a logit of 4 is rounded by up to 0.016 in bfloat16
    torch.testing.assert_close(loss[same], expected.loss_N[same], rtol=tolerance, atol=tolerance)


def test_the_loss_is_transformers_shifted_loss(run, model):
    ids = text_ids()
    labels = ids.clone()
    labels[:, :7] = -100
    output = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    base = _base(run)(ids, labels=labels)
    torch.testing.assert_close(model(ids, labels=labels, thresholds=CLOSED).loss, base.loss)


def test_the_loss_trains_the_stages_on_their_own_tokens(model):
    model.train()
    ids = text_ids()
    output = model(ids, labels=ids, output_exits=True)
    output.loss.backward()
    assert set(output.exits.unique().tolist()) >= {1, 2}
    for stage in model.stages:
        assert stage.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    model(ids, labels=ids, thresholds=CLOSED).loss.backward()
    assert all(p.grad is None for p in model.stages.parameters())


# --- equivalences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_token_let_in_is_the_base_exactly(run, dtype):
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype)
    ids = text_ids()
    output = model(ids, thresholds=CLOSED, output_exits=True)
    assert torch.equal(output.logits, _base(run, dtype)(ids).logits)
    assert (output.exits == 0).all()
    assert output.scores.isnan().all()  # nobody asked for a score


def test_below_every_score_is_the_base_exactly(run, model):
    ids = text_ids()
    output = model(ids, thresholds=[-1e9, -1e9], output_exits=True)
    assert (output.exits == 0).all()
    torch.testing.assert_close(output.logits, _base(run)(ids).logits, rtol=0, atol=0)
    assert not output.scores[..., 0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_let_in_goes_through_every_stage(appended, dtype):
    model = CascadeForCausalLM.from_pretrained(appended, dtype=dtype).requires_grad_(False)
    ids = text_ids()
    output = model(ids, thresholds=OPEN, output_exits=True)
    assert (output.exits == 2).all()
    kept = {}
    base = _base(appended, dtype)
    base.model.norm.register_forward_pre_hook(lambda _m, args: kept.update(residual=args[0]))
    last = base.model(ids).last_hidden_state
    hidden = (kept["residual"] if model.config.reads == "residual" else last).flatten(0, 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for stage in model.stages:
            hidden, normed = stage(hidden)
            hidden = hidden.to(dtype)
    head = base.lm_head if model.stages[1].lm_head is None else model.stages[1].lm_head
    torch.testing.assert_close(output.logits.flatten(0, 1), head(normed.to(dtype)), rtol=2e-2, atol=2e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(output.logits.flatten(0, 1), head(normed), rtol=1e-5, atol=1e-5)


def _agree(output, rows, dtype):
    """``output`` against rows computed otherwise: [(row, positions of it, their logits, their exits)]."""
    for row, kept, logits, exits in rows:
        same = output.exits[row, kept] == exits
        assert same.all() if dtype == torch.float32 else same.float().mean() > 0.9  # a score may round over a threshold
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(output.logits[row, kept][same], logits[same], rtol=tolerance, atol=tolerance)


def _clear_thresholds(model, sequences) -> list[float]:
    """Thresholds in the widest gap between the middle scores of ``sequences``. A trained threshold is some token's own
    score, and in bfloat16 such a token comes out on either side of it."""
    chosen: list[float] = []
    for number in range(2):
        thresholds = [*chosen, math.inf, -math.inf][:2]
        score_N = torch.cat(
            [model(s, output_exits=True, thresholds=thresholds).scores[0, :, number] for s in sequences]
        )
        score_N = score_N[~score_N.isnan()].sort().values
        middle = score_N[len(score_N) // 4 : 3 * len(score_N) // 4]
        gap = int(middle.diff().argmax())
        chosen.append(middle[gap : gap + 2].mean().item())
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_nothing(run, dtype, side):
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype).requires_grad_(False)
    lengths = [24, 9, 17, 1]
    sequences = [text_ids(1, n) for n in lengths]
    ids, mask = torch.zeros(4, 24, dtype=torch.int64), torch.zeros(4, 24, dtype=torch.int64)
    kept = [slice(24 - n, 24) if side == "left" else slice(0, n) for n in lengths]
    for row, (sequence, where) in enumerate(zip(sequences, kept, strict=True)):
        ids[row, where], mask[row, where] = sequence[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    asked = {"output_exits": True, "thresholds": _clear_thresholds(model, sequences)}
    output = model(ids, attention_mask=mask, position_ids=positions, **asked)
    assert torch.equal(output.exits == -1, mask == 0)
    alone = [model(sequence, **asked) for sequence in sequences]
    assert {int(e) for o in alone for e in o.exits.unique()} == {0, 1, 2}
    _agree(output, [(i, kept[i], o.logits[0], o.exits[0]) for i, o in enumerate(alone)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_sequences_changes_nothing(run, dtype):
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype).requires_grad_(False)
    ids, order = text_ids(6), torch.tensor([3, 0, 5, 1, 4, 2])
    output, other = model(ids, output_exits=True), model(ids[order], output_exits=True)
    _agree(output, [(int(row), slice(None), other.logits[i], other.exits[i]) for i, row in enumerate(order)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_changes_nothing(run, dtype):
    model = CascadeForCausalLM.from_pretrained(run, dtype=dtype).requires_grad_(False)
    ids = text_ids(3)
    whole = model(ids, output_exits=True)
    first = model(ids[:, :10], use_cache=True, output_exits=True)
    parts, cache = [first], cache_of(first)
    for position in range(10, 24):
        parts.append(model(ids[:, position : position + 1], **with_cache(cache), use_cache=True, output_exits=True))
    logits, exits = torch.cat([p.logits for p in parts], 1), torch.cat([p.exits for p in parts], 1)
    _agree(whole, [(row, slice(None), logits[row], exits[row]) for row in range(3)], dtype)


def test_float16_says_nearly_the_same(run):
    ids = text_ids()
    half, full = (CascadeForCausalLM.from_pretrained(run, dtype=d)(ids) for d in (torch.float16, torch.float32))
    close = (half.logits.float() - full.logits).abs().amax(-1) < 3e-2
    assert close.float().mean() > 0.97  # the others' scores rounded over a threshold
    assert half.logits.dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("criterion", ["entropy", "cosine"])
def test_every_family_has_its_cascade(family, criterion, tmp_path):
    config_class, model_class, changes = FAMILIES[family]
    base_config = config_class(**{**tiny_llama_config().to_dict(), **changes, "model_type": config_class.model_type})
    shapes = [
        StageConfig.from_base(base_config, layers=1, init="identity", head="shared", reads="residual"),
        StageConfig.from_base(base_config, layers=2, init="random", head="own", reads="residual"),
    ]
    stages = [{**shape.to_dict(), "threshold": 0.0} for shape in shapes]
    config = CascadeConfig(base_config=base_config, criterion=criterion, stages=stages)
    model = CascadeForCausalLM(config).eval()
    assert isinstance(model.base, model_class)
    ids = text_ids()
    open_scores = model(ids, thresholds=OPEN, output_exits=True).scores
    chosen = open_scores.flatten(0, 1).median(0).values.tolist()
    output = model(ids, thresholds=chosen, output_exits=True)
    assert output.exits.unique().tolist() == [0, 1, 2]
    assert torch.equal(model(ids, thresholds=CLOSED).logits, model.base(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids, thresholds=chosen).logits, output.logits)
    how = {"max_new_tokens": 4, "do_sample": False, "thresholds": chosen, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **how), loaded.generate(ids, **how, use_cache=False))


# --- real skipping ---------------------------------------------------------------------------------------------------


def test_a_stage_computes_its_hard_tokens_only(model):
    rows = [_calls(stage.layers[0]) for stage in model.stages]
    output = model(text_ids(), output_exits=True)
    assert [sum(r) for r in rows] == [int((output.exits >= n).sum()) for n in (1, 2)]
    assert 0 < sum(rows[1]) < sum(rows[0]) < output.exits.numel()


def test_cosine_makes_logits_only_where_tokens_leave(tiny_runs):
    model = CascadeForCausalLM.from_pretrained(tiny_runs["seed"])
    heads = [model.base.lm_head, *(stage.lm_head for stage in model.stages)]
    rows = [_calls(head) for head in heads]
    output = model(text_ids(), output_exits=True)
    assert [sum(r) for r in rows] == torch.bincount(output.exits.flatten(), minlength=3).tolist()


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, 20])], ids=["1", "5", "indices"])
def test_logits_to_keep_computes_no_others(appended, keep):
    model, ids = CascadeForCausalLM.from_pretrained(appended), text_ids(3)
    whole = model(ids, output_exits=True)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    rows, stage_rows = _calls(model.base.lm_head), _calls(model.stages[0])
    output = model(ids, logits_to_keep=keep, output_exits=True)
    torch.testing.assert_close(output.logits, whole.logits[:, kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.exits, whole.exits[:, kept])
    assert max(rows, default=0) <= output.exits.numel()
    assert sum(stage_rows) == int((output.exits >= 1).sum())


def test_scores_are_those_of_the_doors_a_token_came_to(model):
    output = model(text_ids(), output_exits=True)
    first, second = model.config.thresholds
    assert not output.scores[..., 0].isnan().any()
    assert torch.equal(output.scores[..., 1].isnan(), output.exits == 0)
    assert torch.equal(output.exits >= 1, output.scores[..., 0] <= first)
    assert torch.equal(output.exits == 2, output.scores[..., 1] <= second)
    assert model(text_ids()).exits is None


def test_mistakes_are_named(model):
    with pytest.raises(InputError, match=r"thresholds: \[0.0\]; must be 2 numbers"):
        model(text_ids(), thresholds=[0.0])
    with pytest.raises(InputError, match="thresholds"):
        model(text_ids(), thresholds=[0.0, math.nan])
    with pytest.raises(ValueError, match="exactly one"):
        model()
    stages = [{**model.config.stages[0], "kind": "sideways"}]
    with pytest.raises(InputError, match="stage 1 is of kind 'sideways'; must be one of append, second-look"):
        CascadeConfig(base_config=model.config.base_config, stages=stages)
    with pytest.raises(InputError, match="criterion: 'mood'"):
        CascadeConfig(criterion="mood")


def test_the_attention_asked_for_is_the_base_s(run):
    model = CascadeForCausalLM.from_pretrained(run, attn_implementation="eager")
    assert model.base.model.layers[0].self_attn.config._attn_implementation == "eager"
    ids = text_ids()
    expected = CascadeForCausalLM.from_pretrained(run)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_tuples_are_there_for_those_who_want_them(model):
    assert isinstance(model(text_ids(), return_dict=False), tuple)
