"""Numbers on record (see ``golden_runs.py``): the same bits on the machine that recorded them, near elsewhere."""

import json
from pathlib import Path

import golden_runs
import pytest

RECORD = json.loads(Path(__file__).with_name("golden_runs.json").read_text())
SAME_MACHINE = golden_runs.machine() == RECORD["machine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def made(folder):
    return golden_runs.make(folder)


@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_a_run_is_as_recorded(made, name):
    found, recorded = made["runs"][name], RECORD["runs"][name]
    if SAME_MACHINE:
        assert found == recorded
    assert found["results"].keys() == recorded["results"].keys()
    assert found["results"]["settings"] == recorded["results"]["settings"]
    for key in ("val_ppl", "all_token_val_ppl", "all_token_test_ppl"):
        for part in ("base", "final"):
            if key in recorded["results"][part]:
                assert found["results"][part][key] == pytest.approx(recorded["results"][part][key], rel=0.05)


@pytest.mark.parametrize("name", golden_runs.MODELS)
def test_evaluation_and_text_are_as_recorded(made, name):
    found, recorded = made["evaluate"][name], RECORD["evaluate"][name]
    if SAME_MACHINE:
        assert found == recorded
        assert made["generate"][name] == RECORD["generate"][name]
    for ours, theirs in zip(found["rows"], recorded["rows"], strict=True):
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.05)


@pytest.mark.parametrize("name", golden_runs.PLANS)
def test_a_plan_is_as_recorded(made, name):
    assert made["plan"][name] == RECORD["plan"][name]


def test_a_full_finetune_is_as_recorded(made):
    found, recorded = made["full fine-tune"], RECORD["full fine-tune"]
    if SAME_MACHINE:
        assert found == recorded
    assert found["final"]["all_token_val_ppl"] == pytest.approx(recorded["final"]["all_token_val_ppl"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(
    not SAME_MACHINE, reason="bits were recorded on another machine; test_resume.py compares runs made here"
)
def test_a_run_that_was_killed_is_as_recorded(folder):
    for name, found in golden_runs.resumed(folder).items():
        recorded = RECORD["runs"][name]
        assert found["results"].pop("settings") != recorded["results"].pop("settings")  # how often it was saved
        assert found == recorded
