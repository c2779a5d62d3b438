"""A second look inside the model: what it equals, with and without a cache, and what it runs and refuses."""

import copy
import json
import math

import pytest
import torch
from conftest import text_ids, tiny_llama_config
from second_look_cases import family_model
from test_stage import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, StaticCache

from cascade_fast.base.cache_name import cache_of, with_cache
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.stages.second_look import SecondLookConfig

LAYERS = 2
CLOSED, OPEN = [-math.inf] * 2, [math.inf] * 2
CRITERIA = ["entropy", "cosine"]


def _cascade(base, criterion="entropy", *, noise=0.1, stages=2) -> CascadeForCausalLM:
    """``base`` with two looks, each the base's last layers and noise; half of the tokens go on at each exit."""
    shape = SecondLookConfig.from_base(base.config, layers=LAYERS)
    config = CascadeConfig(
        base_config=base.config,
        base={"name": "nowhere", "fingerprint": "0" * 64},
        criterion=criterion,
        stages=[{**shape.to_dict(), "threshold": 0.0} for _ in range(stages)],
    )
    model = CascadeForCausalLM(config).eval().requires_grad_(False)
    model.base.load_state_dict(base.state_dict())
    copied = {
        f"layers.{number}.{name}": tensor
        for number, layer in enumerate(base.model.layers[shape.entry_layer :])
        for name, tensor in layer.state_dict().items()
    }
    copied["norm.weight"] = base.model.norm.weight
    for stage in model.stages:
        stage.load_state_dict(copied)
        for parameter in stage.parameters():
            parameter += noise * torch.randn(parameter.shape)
    for number in range(stages):  # one after the other: the second sees only those that the first lets in
        thresholds = [*model.config.thresholds[:number], *[math.inf] * (stages - number)]
        scores = model(text_ids(), thresholds=thresholds, output_exits=True).scores[..., number]
        model.config.stages[number]["threshold"] = scores[~scores.isnan()].median().item()
    return model


@pytest.fixture(scope="module")
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(params=CRITERIA)
def model(request, base):
    torch.manual_seed(0)
    return _cascade(base, request.param)


def _changed(base, stage):
    """transformers' model with a stage's layers and norm in the place of the base's last."""
    changed, first = copy.deepcopy(base), base.config.num_hidden_layers - LAYERS
    for name, tensor in stage.state_dict().items():
        kind, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        theirs = f"model.layers.{int(number) + first}.{inner}" if kind == "layers" else f"model.{name}"
        changed.get_parameter(theirs).copy_(tensor)
    return changed


def _same(output, expected, rows=slice(None)):
    assert torch.equal(output.exits, expected.exits[rows])
    torch.testing.assert_close(output.logits, expected.logits[rows], rtol=1e-4, atol=1e-4)


def _calls(module) -> list[int]:
    rows: list[int] = []
    module.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[:-1].numel()))
    return rows


# --- what it equals --------------------------------------------------------------------------------------------------


def test_the_definition_token_by_token(base):
    """With transformers' models alone: each keeps a cache in which a token's keys and values are those of its latest
    exit so far."""
    model, ids = _cascade(base), text_ids(1)
    output = model(ids, output_exits=True)
    models = [base, *(_changed(base, stage) for stage in model.stages)]
    caches = [DynamicCache() for _ in models]
    for position in range(ids.shape[1]):
        going_on, exit_ = True, 0
        for number, (reader, cache) in enumerate(zip(models, caches, strict=True)):
            if going_on:
                logits = reader(ids[:, position : position + 1], **with_cache(cache), use_cache=True).logits[0, 0]
                exit_, entropy = number, torch.distributions.Categorical(logits=logits).entropy()
                going_on = number < 2 and -entropy <= model.config.thresholds[number]
            else:  # it never came here: what the exit before has left
                for layer, before in enumerate(caches[number - 1].layers):
                    cache.update(before.keys[:, :, -1:], before.values[:, :, -1:], layer)
            if number == exit_:
                expected = logits
        assert exit_ == output.exits[0, position]
        torch.testing.assert_close(output.logits[0, position], expected, rtol=1e-4, atol=1e-4)
    assert output.exits.unique().tolist() == [0, 1, 2]


def test_every_token_through_every_stage_is_the_base_with_the_last_stage_s_layers(model, base):
    ids = text_ids()
    output = model(ids, thresholds=OPEN, output_exits=True)
    assert (output.exits == 2).all()
    torch.testing.assert_close(output.logits, _changed(base, model.stages[1])(ids).logits, rtol=1e-4, atol=1e-4)
    only = model(ids, thresholds=[math.inf, -math.inf]).logits
    torch.testing.assert_close(only, _changed(base, model.stages[0])(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_closed_stages_are_the_base_exactly(model, base, use_cache):
    ids, mask = text_ids(), torch.ones(4, 24, dtype=torch.int64)
    mask[1, :9] = 0
    for thresholds in (CLOSED, [-math.inf, math.inf], [-1e9, -1e9]):
        output = model(ids, attention_mask=mask, thresholds=thresholds, use_cache=use_cache)
        assert torch.equal(output.logits, base(ids, attention_mask=mask).logits)
        assert (cache_of(output) is None) == (use_cache is False)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_an_untrained_look_is_the_base(family, tmp_path):
    base = family_model(family).eval().requires_grad_(False)
    model, ids = _cascade(base, noise=0.0), text_ids()
    output = model(ids, output_exits=True)
    assert output.exits.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(output.logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    _cascade(base).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **how), loaded.generate(ids, **how, use_cache=False))


# --- padding ---------------------------------------------------------------------------------------------------------


def _padded(side, fill):
    """Rows of 24, 9, 17 and 1 tokens between padding of the token ``fill``."""
    lengths = [24, 9, 17, 1]
    kept = [slice(24 - n, 24) if side == "left" else slice(0, n) for n in lengths]
    ids, mask, text = torch.full((4, 24), fill), torch.zeros(4, 24, dtype=torch.int64), text_ids()
    for row, (where, n) in enumerate(zip(kept, lengths, strict=True)):
        ids[row, where], mask[row, where] = text[row, :n], 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_read_by_nobody(model, side, dtype):
    """Other padding changes no bit, it enters no stage, and each row is what it is alone."""
    model = model.to(dtype)
    torch.manual_seed(1)
    one, kept = _padded(side, fill=0)
    torch.manual_seed(1)
    two, _ = _padded(side, fill=77)
    rows = [_calls(stage.layers[0]) for stage in model.stages]
    output, other = model(**one, output_exits=True), model(**two, output_exits=True)
    assert torch.equal(output.exits, other.exits)
    assert torch.equal(output.exits == -1, one["attention_mask"] == 0)
    assert [sum(r) for r in rows] == [2 * int((output.exits >= n).sum()) for n in (1, 2)]
    for row, where in enumerate(kept):
        assert torch.equal(output.logits[row, where], other.logits[row, where])
        alone = model(one["input_ids"][row, where][None], output_exits=True)
        same = alone.exits[0] == output.exits[row, where]
        assert same.all() if dtype == torch.float32 else same.float().mean() > 0.8
        if same.all():
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(alone.logits[0], output.logits[row, where], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_the_gradients(base, side):
    gradients = []
    for fill in (0, 77):
        torch.manual_seed(1)
        model = _cascade(base).requires_grad_(True)
        inputs, _ = _padded(side, fill)
        masks = []
        for stage in model.stages:
            stage.register_forward_hook(lambda _m, args, _out, masks=masks: masks.append(args[0].mask()))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        assert all(mask.any(-1).all() for mask in masks)  # a row without a key would be NaN with some kernels
        gradients.append(torch.cat([p.grad.flatten() for p in model.stages.parameters()]))
    assert torch.equal(*gradients)
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().sum() > 0


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("steps", [[23, 1], [10] + [1] * 14, [5, 7, 1, 11], [1] * 24])
def test_in_pieces_as_in_one(model, side, steps):
    """Whatever the pieces, with the logits of the last position only or of all."""
    inputs = {"input_ids": text_ids(4)} if side is None else _padded(side, fill=3)[0]
    whole = model(**inputs, output_exits=True)
    cache, done = None, 0
    for number, step in enumerate(steps):
        part = {name: tensor[:, done : done + step] for name, tensor in inputs.items()}
        if side is not None:
            part["attention_mask"] = inputs["attention_mask"][:, : done + step]
        keep = number % 2
        output = model(**part, **with_cache(cache), use_cache=True, logits_to_keep=keep, output_exits=True)
        cache, done = cache_of(output), done + step
        read = slice(done - 1, done) if keep else slice(done - step, done)
        mask = inputs.get("attention_mask", torch.ones(4, 24))[:, read].bool()
        assert torch.equal(output.exits, whole.exits[:, read])
        torch.testing.assert_close(output.logits[mask], whole.logits[:, read][mask], rtol=1e-4, atol=1e-4)
    assert {layer.get_seq_length() for layer in cache.layers} == {24}
    assert len(cache.layers) == 3 + 2 * LAYERS


def test_the_cache_holds_what_the_latest_exit_left(base):
    model, ids = _cascade(base), text_ids(2)
    output = model(ids, output_exits=True)
    layers = cache_of(output).layers
    theirs = cache_of(base(ids)).layers
    for number in range(LAYERS):
        for what in ("keys", "values"):
            of_base, first, second = (getattr(layers[number + n], what).transpose(1, 2) for n in (1, 3, 5))
            torch.testing.assert_close(of_base, getattr(theirs[1 + number], what).transpose(1, 2))
            differs = [(a != b).flatten(2).any(-1) for a, b in ((first, of_base), (second, first))]
            assert torch.equal(differs[0], output.exits >= 1)
            assert torch.equal(differs[1], output.exits == 2)


def test_beams_drafts_and_several_answers(model):
    """What transformers does to a cache between two steps: reordering, cropping, repeating, selecting."""
    model.generation_config.eos_token_id = 299  # never comes; 5.0 cannot look drafts up without one
    ids = text_ids(1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "pad_token_id": 0}
    plain = model.generate(ids, **how, do_sample=False, use_cache=False)
    assert torch.equal(plain, model.generate(ids, **how, do_sample=False))
    assert torch.equal(plain, model.generate(ids, **how, do_sample=False, prompt_lookup_num_tokens=4))
    beams = [model.generate(ids, **how, do_sample=False, num_beams=3, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        answers.append(model.generate(ids, **how, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert torch.equal(*answers)
    assert len(answers[0].unique(dim=0)) == 3


def test_a_cache_repeated_selected_and_cropped(model):
    ids, more = text_ids(2), text_ids(2, 5)
    cache = cache_of(model(ids, use_cache=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    model(more, **with_cache(cache), use_cache=True)
    cache.crop(-5)
    output = model(more, **with_cache(cache), use_cache=True, output_exits=True)
    whole = model(torch.cat([ids[[1, 0]], more], 1), output_exits=True)
    assert torch.equal(output.exits, whole.exits[:, -5:])
    torch.testing.assert_close(output.logits, whole.logits[:, -5:], rtol=1e-4, atol=1e-4)


def test_doors_may_close_and_open_between_two_calls(model):
    """A token read while they were closed has left the base's keys and values to every stage."""
    ids = text_ids(2)
    cache = cache_of(model(ids[:, :12], use_cache=True, thresholds=CLOSED))
    one = model(ids[:, 12:], **with_cache(cache), use_cache=True)
    of_base = cache_of(model.base(ids[:, :12], use_cache=True))
    two = model(ids[:, 12:], **with_cache(of_base), use_cache=True)
    assert torch.equal(one.logits, two.logits)
    assert not torch.allclose(one.logits, model(ids).logits[:, 12:], atol=1e-3)


# --- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([20, 0, 7, 7, -1])], ids=["1", "5", "indices"])
def test_every_hard_token_runs_but_the_head_only_for_those_kept(model, keep):
    ids = text_ids(3)
    whole = model(ids, output_exits=True)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    rows = [_calls(stage.layers[0]) for stage in model.stages]
    head_rows = _calls(model.base.lm_head)
    output = model(ids, logits_to_keep=keep, output_exits=True)
    torch.testing.assert_close(output.logits, whole.logits[:, kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.exits, whole.exits[:, kept])
    torch.testing.assert_close(output.scores, whole.scores[:, kept], equal_nan=True, rtol=1e-4, atol=1e-4)
    assert [sum(r) for r in rows] == [int((whole.exits >= n).sum()) for n in (1, 2)]
    distinct = whole.exits[:, torch.arange(24)[kept].unique()]
    if model.config.criterion == "entropy":  # exits ask for it of all that come there; the last exit has none
        assert sum(head_rows) == int((whole.exits >= 0).sum() + (whole.exits >= 1).sum() + (distinct == 2).sum())
    else:
        assert sum(head_rows) == distinct.numel()


def test_sequences_without_a_hard_token_cost_nothing(base):
    model, ids = _cascade(base), text_ids(4)
    packs = []
    model.stages[0].register_forward_hook(lambda _m, args, _out: packs.append(args[0]))
    exits = model(ids[:, :3], output_exits=True).exits
    hard = (exits >= 1).any(1)
    assert packs[0].kv_BSL2GE.shape[0] == hard.sum()
    packs.clear()
    model(ids, thresholds=[-1e9, math.inf])
    assert packs == []


def test_the_loss_trains_the_looks_through_their_keys(base):
    model = _cascade(base).requires_grad_(True)
    ids = text_ids()
    labels = torch.full_like(ids, -100)
    exits = model(ids, output_exits=True).exits
    last = int((exits[0] >= 1).nonzero()[-1])  # of those that enter stage 1; it has keys before it
    assert last > 0
    labels[0, last + 1 if last < 23 else last] = 5
    model(ids, labels=labels, thresholds=[model.config.thresholds[0], -math.inf]).loss.backward()
    assert model.stages[0].layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.stages[1].parameters())
    assert model.base.model.layers[0].self_attn.k_proj.weight.grad.isfinite().all()


def test_with_every_token_in_a_look_the_gradients_are_fine_tuning_s(base):
    model, ids = _cascade(base).requires_grad_(True), text_ids()
    dense = _changed(base, model.stages[0]).requires_grad_(True)
    model(ids, labels=ids, thresholds=[math.inf, -math.inf]).loss.backward()
    dense(ids, labels=ids).loss.backward()
    first = len(base.model.layers) - LAYERS
    pairs = [*zip(model.stages[0].layers, dense.model.layers[first:], strict=True)]
    pairs += zip(model.base.model.layers[:first], dense.model.layers[:first], strict=True)
    for mine, theirs in pairs:
        expected = dict(theirs.named_parameters())
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_the_card_and_the_folders(tiny_runs, tmp_path):
    model = CascadeForCausalLM.from_pretrained(tiny_runs["look"])
    model.save_pretrained(tmp_path / "thin", self_contained=False)
    card = (tmp_path / "thin" / "README.md").read_text()
    assert "2 stage(s), copies of its last 2 layers trained to read its *hard* tokens again" in card
    assert "| stage_kind | second-look |" in card
    saved = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert [stage["kind"] for stage in saved["stages"]] == ["second-look"] * 2
    assert not any("rotary" in name or "head" in name for name in model.stages.state_dict())


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_mistakes_are_named(model, base):
    ids = text_ids()
    static = StaticCache(config=base.config, max_cache_len=32)
    with pytest.raises(ValueError, match="cache: StaticCache; a second look needs a DynamicCache"):
        model(ids, **with_cache(static))
    with pytest.raises(ValueError, match="attention_mask: 4 dimensions"):
        model(ids, attention_mask=torch.ones(4, 1, 24, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="position_ids: not one text a row"):
        model(ids, position_ids=torch.arange(12).repeat(2)[None])
    stages = model.config.stages
    appended = {**stages[0], "kind": "append"}
    with pytest.raises(InputError, match=r"stages: kind is .*'append'.*; must be the same for all"):
        CascadeConfig(base_config=base.config, stages=[stages[0], appended])
    with pytest.raises(InputError, match=r"stages: entry_layer is .* must be the same for all"):
        CascadeConfig(base_config=base.config, stages=[stages[0], {**stages[1], "entry_layer": 0, "layers": 3}])


def test_a_sliding_window_holds_up_to_its_length():
    shape = {k: v for k, v in tiny_llama_config().to_dict().items() if k not in ("model_type", "rope_parameters")}
    base = AutoModelForCausalLM.from_config(MistralConfig(**{**shape, "sliding_window": 24}))
    model = _cascade(base.eval())
    model.generation_config.eos_token_id = 299  # never comes; 5.0 cannot look drafts up without one
    ids = text_ids(2)
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids)[:, :14]}
    generated = [model.generate(ids[:, :14], **how, max_new_tokens=11, use_cache=c) for c in (True, False)]
    assert torch.equal(*generated)
    with pytest.raises(InputError, match=r"input_ids: 25 tokens .* attends to the last 24 only.* must be at most 24"):
        model.generate(ids[:, :14], **how, max_new_tokens=12)
    filled = cache_of(base(ids[:, :5], use_cache=True))
    with pytest.raises(ValueError, match="forgets what has left the sliding window"):
        model(ids[:, 5:], **with_cache(filled))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradients_of_the_base_cannot_be_checkpointed(base):
    model = _cascade(base).train()
    model.base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache: the base kept none"):
        model(text_ids())


def test_the_test_s_stages_differ(model):
    one, two = (nn.utils.parameters_to_vector(stage.parameters()) for stage in model.stages)
    assert not torch.equal(one, two)
