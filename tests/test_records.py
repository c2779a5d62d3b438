"""Records: what is written is read back, older files are read, and what is wrong is named with its place."""

import json
from pathlib import Path

import made_records
import pytest

from cascade_fast.input_checks import InputError
from cascade_fast.records import Epoch, FinetuneResults, RunRecord, RunResults, StageRecord, any_results
from cascade_fast.runtime.files import DamagedFile, load_record, write_json
from cascade_fast.runtime.run_folder import read_results

EXAMPLE = Path(__file__).parent.parent / "docs" / "example-report" / "results.json"


@pytest.mark.parametrize("name", ["warm", "seed", "look", "example"])
def test_results_are_read_as_they_are_written(tiny_runs, name):
    file = EXAMPLE if name == "example" else tiny_runs[name] / "results.json"
    written = json.loads(file.read_text())
    results = RunResults.from_dict(written)
    assert isinstance(results.stages[0].epochs[0], Epoch)
    written.pop("sha256", None)
    assert results.to_dict() == written
    assert json.dumps(results.to_dict()["stages"]) == json.dumps(written["stages"])  # in this order, too


def test_an_older_file_lacks_what_came_later():
    given = made_records.results([made_records.stage(threshold=0.2)], 1, {}).to_dict()
    assert not {"compute", "memory"} & given.keys()
    del given["stages"][0]["exit_threshold"], given["stages"][0]["epochs"][0]["skipped_steps"]
    results = RunResults.from_dict(given)
    assert (results.compute, results.memory, results.stages[0].compute) == (None, None, None)
    assert results.stages[0].exit_threshold == 0.2  # that of training
    assert results.epochs[0].skipped_steps is None


def test_a_newer_file_has_what_is_not_known():
    given = made_records.epoch().to_dict()
    assert Epoch.from_dict({**given, "mood": "good"}) == made_records.epoch()


def test_a_cascade_and_a_full_fine_tune_are_told_apart():
    cascade = made_records.results([made_records.stage()], 1, {}).to_dict()
    assert isinstance(any_results(cascade), RunResults)
    full = {name: cascade[name] for name in ("base", "tokens", "settings", "final")}
    found = any_results({**full, "epochs": [made_records.epoch().to_dict()], "best_epoch": 1, "stopped": "early"})
    assert isinstance(found, FinetuneResults)
    assert found.epochs == [made_records.epoch()]


@pytest.mark.parametrize(
    ("record", "changes", "said"),
    [
        (Epoch, {"tokens": None}, "tokens: None; must be an integer"),
        (Epoch, {"val_loss": "2"}, "val_loss: '2'; must be a number"),
        (Epoch, {"val_loss": True}, "val_loss: True; must be a number"),
        (StageRecord, {"epochs": 3}, "epochs: 3; must be a list"),
        (StageRecord, {"epochs": [3]}, "epochs 1: 3; must be a map"),
        (StageRecord, {"epochs": [{"epoch": 1}]}, "epochs 1: has no tokens, train_loss"),
        (StageRecord, {"exit_share": {"base": "all"}}, "exit_share: base: 'all'; must be a number"),
        (StageRecord, {"compute": {"tokens": 1}}, "compute: has no layer_tokens"),
        (RunRecord, {}, "has no settings, fingerprints, versions, machine"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, record, changes, said):
    whole = {Epoch: made_records.epoch().to_dict(), StageRecord: made_records.stage().to_dict()}.get(record, {})
    given = {**whole, **changes}
    with pytest.raises(InputError) as raised:
        record.from_dict(given)
    assert str(raised.value).startswith(said)
    write_json(tmp_path / "file.json", given)
    with pytest.raises(DamagedFile) as damaged:
        load_record(tmp_path / "file.json", record.from_dict)
    assert str(damaged.value) == f"'{tmp_path / 'file.json'}' is damaged: {raised.value}"


def test_results_that_are_no_map_or_not_there(tmp_path):
    with pytest.raises(DamagedFile, match=r"results\.json' is missing"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(DamagedFile, match="holds list, not an object"):
        read_results(tmp_path)
