"""Criteria: entropy, noise, registered names, and the check of what a criterion returns."""

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch
from hard_token_cases import DTYPES, as_given, hidden
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_fast import cascade, criteria, evaluate, generate, losses
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.criteria import (
    CRITERIA,
    TokensAtExit,
    get_criterion,
    register_criterion,
    score_by_two,
    score_tokens,
    token_entropy,
    token_margin,
)
from cascade_fast.hard_token_gather import HardTokenGather
from cascade_fast.input_checks import InputError
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.settings import make_settings


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_entropy(dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)  # 16 tokens a chunk
    logits = (torch.randn(3, 21, 40) * 3).to(dtype)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(token_entropy(logits).double(), expected.flatten(), rtol=1e-5, atol=1e-6)
    h_in, h_out = hidden(3, 21, dtype=dtype)
    hard = HardTokenGather(0.3, criterion="entropy")(h_in, h_out, logits=logits)
    torch.testing.assert_close(hard.scores, -expected.float(), rtol=1e-5, atol=1e-6)
    flat = HardTokenGather(0.3, criterion="entropy")(
        h_in.flatten(0, 1), h_out.flatten(0, 1), logits=logits.flatten(0, 1)
    )
    assert torch.equal(flat.index_K, hard.index_K)


def test_entropy_ignores_impossible_tokens_and_takes_no_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -math.inf, -math.inf]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([math.log(2), 0.0]))
    assert token_entropy(torch.empty(0, 9)).shape == token_entropy(torch.empty(2, 0, 9)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("score", [token_entropy, token_margin])
def test_scores_make_no_second_array_of_the_logits_size(dtype, score, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # A view has the storage of the logits; what is new has its own.
            new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != storage
            largest = max(largest, out.numel() if new else 0)
            return out

    logits = torch.randn(4, 65, 50).to(dtype)[:, :-1]  # the usual shift: not contiguous
    storage = logits.untyped_storage().data_ptr()
    with Watch():
        score(logits)
    assert 0 < largest <= 16 * 50


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_margin_and_band_are_their_formulas(dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)  # 16 tokens a chunk
    logits = (torch.randn(3, 21, 40) * 3).to(dtype)
    distribution = torch.distributions.Categorical(logits=logits.double())
    sorted_NV = distribution.probs.flatten(0, 1).sort(descending=True).values
    expected = {
        "margin": sorted_NV[:, 0] - sorted_NV[:, 1],
        "band": (distribution.entropy().flatten() - 2.5).abs(),
    }
    h_in, h_out = hidden(63, dtype=dtype)
    for name, wanted_N in expected.items():
        score_N = score_tokens(name, h_in, h_out, logits=logits)
        torch.testing.assert_close(score_N.double(), wanted_N, rtol=1e-5, atol=1e-6)
    assert torch.equal(score_tokens("margin", h_in, h_out, logits=torch.zeros(63, 40)), torch.zeros(63))


@pytest.mark.parametrize("names", [("entropy", "margin"), ("cosine", "band"), ("margin", "cosine")])
def test_two_scores_of_one_look_are_those_of_two(names, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)
    h_in, h_out = hidden(37)
    head_VD, label_N = torch.randn(40, h_in.shape[1]), torch.randint(40, (37,))
    tokens, how = TokensAtExit(h_in, h_out), {"dtype": torch.float32}
    first, second = (get_criterion(name) for name in names)
    *scores, loss_N = score_by_two(first, second, tokens, h_out, head_VD, label_N, **how)
    for criterion, score_N in zip((first, second), scores, strict=True):
        alone_N, loss_alone_N = criterion.score_with_losses(tokens, h_out, head_VD, label_N, **how)
        assert torch.equal(score_N, alone_N)
        assert torch.equal(loss_N, loss_alone_N)


def test_the_flag_s_choices_are_the_registry_s_names():
    """Which the settings know without torch, that ``--help`` comes at once."""
    code = (
        "import sys; from cascade_fast import settings; assert 'torch' not in sys.modules; "
        "names = list(settings.CRITERIA); from cascade_fast import criteria; "
        "assert names == settings.CRITERIA == list(criteria.CRITERIA), names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_noise_is_uniform_and_repeats():
    h_in, h_out = hidden(50, 40)
    gather = HardTokenGather(0.3, criterion="random")
    torch.manual_seed(1)
    first, second = gather(h_in, h_out), gather(h_in, h_out)
    torch.manual_seed(1)
    assert torch.equal(gather(h_in, h_out).scores, first.scores)
    assert not torch.equal(first.scores, second.scores)
    assert 0 <= first.scores.min() < first.scores.max() < 1
    assert first.threshold.item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.usefixtures("own_criteria")
def test_registering_a_criterion():
    assert register_criterion("first feature")(as_given) is as_given
    h_in, h_out = hidden(2, 5)
    named = HardTokenGather(0.5, criterion="first feature")(h_in, h_out)
    assert torch.equal(named.scores, h_out[..., 0])
    with pytest.raises(ValueError, match="name: 'cosine'; must not be taken"):
        register_criterion("cosine")
    with pytest.raises(ValueError, match="name: ''; must be a string"):
        register_criterion("")


@pytest.mark.parametrize(
    "returned", [torch.zeros(10, 1), torch.zeros(9), torch.zeros(10, dtype=torch.int64), 0.5, torch.zeros(2, 5)]
)
def test_what_a_criterion_returns_is_checked(returned):
    h_in, h_out = hidden(10)
    with pytest.raises(ValueError, match=r"criterion: .* returned .*; must return a float tensor of shape \(10,\)"):
        score_tokens(lambda h_in_ND, h_out_ND, *, logits: returned, h_in, h_out)


# --- a criterion of the user's, from the gather to the model ----------------------------------------------------------


def boldness(h_in_ND, h_out_ND, *, logits=None):
    """The likeliest token's probability: low where the model does not commit itself."""
    return logits.float().softmax(-1).amax(-1).flatten()


def step(h_in_ND, h_out_ND, *, logits=None):
    assert logits is None
    return -(h_out_ND.float() - h_in_ND.float()).norm(dim=-1)


def registered(function, **options):
    return register_criterion(function.__name__, label=f"the {function.__name__}", **options)(function)


@pytest.mark.usefixtures("own_criteria")
def test_registered_logits_are_asked_for():
    registered(boldness, needs_logits=True)
    h_in, h_out = hidden(2, 5)
    logits = torch.randn(2, 5, 30)
    hard = HardTokenGather(0.5, criterion="boldness")(h_in, h_out, logits=logits)
    assert torch.equal(hard.scores.flatten(), boldness(h_in, h_out, logits=logits))
    with pytest.raises(ValueError, match="logits: None; criterion 'boldness' needs the logits of every token"):
        HardTokenGather(0.5, criterion="boldness")(h_in, h_out)


@pytest.mark.usefixtures("own_criteria")
@pytest.mark.parametrize("kind", ["append", "second-look"])
@pytest.mark.parametrize(("function", "needs_logits"), [(boldness, True), (step, False)], ids=["boldness", "step"])
def test_a_registered_criterion_trains_is_evaluated_and_generates(
    tiny_settings, tmp_path, monkeypatch, kind, function, needs_logits
):
    name = function.__name__
    settings = {**tiny_settings, "stage_kind": kind, "accept": "always", "store_dtype": "float32"}
    settings |= {"criterion": name, "out": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(
        InputError, match=f"criterion: '{name}'; must be one of cosine, entropy, margin, band, random, first$"
    ):
        make_settings(settings)
    registered(function, needs_logits=needs_logits)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 0)  # 16 tokens a chunk
    evaluated, real = [], cascade.evaluate_exits
    monkeypatch.setattr(cascade, "evaluate_exits", lambda *a, **k: evaluated.append(real(*a, **k)) or evaluated[-1])
    folder = cascade.run_cascade(make_settings(settings)).path
    results = json.loads((folder / "results.json").read_text())
    assert results["final"]["stages_kept"] == 2
    (train,) = (tmp_path / "cache" / "base-pass").glob("*/train")
    assert (train / "loss.bin").exists() == needs_logits
    assert f"if its score (the {name}) is at or below" in (folder / "report.md").read_text()

    model, made = CascadeForCausalLM.from_pretrained(folder), make_settings(settings)
    ids_BS = load_sequences(made, find_base(made).tokenizer()).splits["val"].blocks()[:, :-1].long()
    trained = next(e for e in evaluated if e.score_NP.shape[1] == 2)  # of validation, with both stages
    with torch.no_grad():
        whole = model(ids_BS, output_exits=True)
        last = model(ids_BS, output_exits=True, logits_to_keep=3)  # the others' logits are made for their scores alone
    assert torch.equal(whole.exits.flatten(), trained.exit_N)
    assert len(trained.exit_N.unique()) == 3
    torch.testing.assert_close(whole.scores.flatten(0, 1), trained.score_NP, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.equal(last.exits, whole.exits[:, -3:])
    torch.testing.assert_close(last.logits, whole.logits[:, -3:], rtol=1e-4, atol=1e-4)

    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    assert generate.main([str(folder), "The value", "--device", "cpu"]) == 0
    model.save_pretrained(tmp_path / "saved")
    assert f"Score: the {name}; low = hard." in (tmp_path / "saved" / "README.md").read_text()
    monkeypatch.setattr(criteria, "CRITERIA", dict(list(CRITERIA.items())[:6]))  # as in another process
    with pytest.raises(InputError, match=f"criterion: '{name}'; must be one of cosine, entropy, margin, band$"):
        CascadeForCausalLM.from_pretrained(folder)


def test_scores_of_other_code_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def score(h_in_ND, h_out_ND, *, logits=None):\n    return {}\n"
    codes = []
    for number, body in enumerate(("h_out_ND[:, 0]", "h_out_ND[:, 0]", "h_out_ND[:, 1]")):
        (tmp_path / f"scores_{number}.py").write_text(source.format(body))
        codes.append(criteria._code_of(importlib.import_module(f"scores_{number}").score))
    assert codes[0] == codes[1] != codes[2]
    module = torch.nn.Linear(2, 1)  # its weights are in no file
    assert criteria._code_of(module) != criteria._code_of(module)
