"""Tokens chosen by one score to be trained on and by another to enter: ``--train-criterion``, ``--route-criterion``."""

import json

import pytest
import torch
from golden_runs import of_run
from second_look_cases import passed_by_base

from cascade_fast import evaluate, report
from cascade_fast.base.model import find_base
from cascade_fast.base.texts import load_sequences
from cascade_fast.cascade import CascadeRun, run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.model.modeling import CascadeForCausalLM
from cascade_fast.runtime.files import read_json, write_json
from cascade_fast.selection import hard_count
from cascade_fast.settings import make_settings

ONE = {"num_stages": 1, "accept": "always", "store_dtype": "float32"}
RAGGED = {"train_blocks": None, "val_blocks": None, "train_tokens": 600, "val_tokens": 200}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_named_twice_the_same_it_is_the_run_of_one_criterion(tiny_settings, tmp_path):
    asked = {**tiny_settings, "accept": "always", "cache_dir": str(tmp_path / "cache")}  # two stages
    one = run_cascade(make_settings({**asked, "out": str(tmp_path / "one")})).path
    both = {"criterion": "cosine", "train_criterion": "entropy", "route_criterion": "entropy"}
    two = run_cascade(make_settings({**asked, **both, "out": str(tmp_path / "two")})).path
    first, second = of_run(one), of_run(two)
    for found in (first, second):
        found["results"].pop("settings")
    assert first == second
    assert results_of(two)["final"]["base_pass_reused"]


@pytest.mark.parametrize(
    ("train", "route", "changes"),
    [
        ("margin", "entropy", {"stage_kind": "second-look", **RAGGED}),
        ("band", "cosine", {"exit_threshold": "validation"}),
        ("random", "entropy", {}),
        ("first", "margin", {}),
        ("entropy", "random", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_trained_on_by_one_and_entered_by_the_other(tiny_settings, tmp_path, monkeypatch, train, route, changes):
    asked = {**tiny_settings, **ONE, **changes, "cache_dir": str(tmp_path / "cache"), "out": str(tmp_path / "run")}
    scores = {}
    for name in (train, route):
        stores = passed_by_base({**asked, "criterion": name}, tmp_path)[2].stores
        scores[name] = {s: stores[s]["score"][stores[s].labelled_index()] for s in ("train", "val")}
    trained_on, real = [], CascadeRun._train_stage

    def watched(self, stage, number, hard, hard_val):
        assert "choice" not in hard_val.store
        labelled_J = hard.store.labelled_index()
        trained_on.append(torch.searchsorted(labelled_J, hard.index_K))
        return real(self, stage, number, hard, hard_val)

    monkeypatch.setattr(CascadeRun, "_train_stage", watched)
    settings = make_settings({**asked, "criterion": "cosine", "train_criterion": train, "route_criterion": route})
    folder = run_cascade(settings).path
    results = results_of(folder)
    (stage,) = results["stages"]
    count = hard_count(settings.hard_ratio, len(scores[train]["train"]))
    assert trained_on[0].tolist() == sorted(scores[train]["train"].argsort(stable=True)[:count].tolist())
    entering = scores[route]["train"] <= stage["threshold"]
    assert int(entering.sum()) == stage["train_hard"] == count
    assert entering.nonzero().squeeze(1).tolist() != trained_on[0].tolist()
    assert stage["val_hard"] == int((scores[route]["val"] <= stage["threshold"]).sum())
    if "exit_threshold" in changes:
        assert stage["exit_threshold"] > stage["threshold"]
    share = (scores[route]["val"] <= stage["exit_threshold"]).double().mean().item()
    assert results["final"]["exit_share"]["stage_1"] == pytest.approx(share)
    assert "were chosen by another score" in (folder / "report.md").read_text()
    assert json.loads((folder / "config.json").read_text())["criterion"] == route
    if route == "random":
        return
    model = CascadeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sequences = load_sequences(settings, find_base(settings).tokenizer()).splits["val"]
    numbers = tmp_path / "evaluated.json"
    assert evaluate.main([str(folder), "--device", "cpu", "--json", str(numbers)]) == 0
    _, cascade_row, *_ = json.loads(numbers.read_text())["rows"]  # after the base's
    assert cascade_row["perplexity"] == pytest.approx(results["final"]["all_token_val_ppl"], rel=1e-4)
    if not changes.get("train_tokens"):
        with torch.no_grad():
            exits_BS = model(sequences.blocks()[:, :-1].long(), output_exits=True).exits
        assert exits_BS.flatten().tolist() == (scores[route]["val"] <= stage["exit_threshold"]).long().tolist()


def test_a_pass_keeps_a_second_score_only_where_there_is_one(tiny_settings, tmp_path):
    def kept(**changes):
        settings = {**tiny_settings, **ONE, **changes}
        passed_by_base(settings, tmp_path / "-".join(map(str, changes.values())))
        return {p.parent.name for p in tmp_path.rglob("choice.bin")}

    assert kept(criterion="margin") == set()
    assert kept(train_criterion="random") == set()
    assert kept(route_criterion="random") == set()  # noise goes by places: the pass is that of the entropy
    assert kept(train_criterion="margin", hard_ratio=1.0) == set()
    assert kept(train_criterion="margin") == {"train"}


def test_a_run_of_an_earlier_version_goes_on_and_is_reported(tiny_settings, tmp_path):
    asked = {**tiny_settings, **ONE, "out": str(tmp_path / "run")}
    folder = run_cascade(make_settings(asked)).path
    for name in ("config.json", "results.json"):
        record = read_json(folder / name)
        for setting in ("train_criterion", "route_criterion"):
            del record["settings"][setting]
        write_json(folder / name, record)
    assert report.main([str(folder)]) == 0
    assert run_cascade(make_settings({**asked, "resume": "auto"})).finished
    with pytest.raises(InputError, match="train_criterion was None, is 'margin'"):
        run_cascade(make_settings({**asked, "resume": "auto", "train_criterion": "margin"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 2}, "num_stages: 2; must be 1 where train_criterion is not route_criterion"),
        ({"train_criterion": "loss"}, "train_criterion: 'loss'; must be one of cosine, entropy, margin, band, random"),
        ({"route_criterion": 3}, "route_criterion: 3; must be text"),
    ],
)
def test_mistakes(tiny_settings, changes, message):
    with pytest.raises(InputError, match=message):
        make_settings({**tiny_settings, "num_stages": 1, "train_criterion": "margin", **changes})
