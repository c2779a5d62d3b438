"""Several runs side by side: the numbers are those of each run, and equal cost is read as it says."""

import csv
import json

import made_records
import pytest

from cascade_fast.comparison.curves import plot_lines
from cascade_fast.comparison.runs import base_row, open_folder, read_rows
from cascade_fast.comparison.tables import (
    COLUMNS,
    best_runs,
    best_within,
    equal_cost_table,
    runs_table,
    verdict,
    winner,
    write_rows,
)
from cascade_fast.input_checks import InputError
from cascade_fast.runtime.files import write_json


def _row(name, seconds, tokens, ppl):
    return {"name": name, "seconds": seconds, "trained_tokens": tokens, "val_ppl": ppl}


# "slow" ends best, but not within what "cascade" takes; "few" is best at equal tokens only.
CURVES = [
    _row("cascade", 10.0, 100, 8.0),
    _row("cascade", 20.0, 200, 7.5),
    _row("slow", 15.0, 150, 7.9),
    _row("slow", 30.0, 300, 6.0),
    _row("few", 25.0, 50, 7.0),
]


def test_equal_cost_reads_no_further_than_the_budget():
    best = best_within(CURVES, "seconds", 20.0)
    assert {name: row["val_ppl"] for name, row in best.items()} == {"cascade": 7.5, "slow": 7.9}
    assert best_within(CURVES, "seconds", 9.9) == {}
    # More training that was worse does not take back what there was before.
    worse = [*CURVES, _row("cascade", 19.0, 190, 9.0)]
    assert best_within(worse, "seconds", 19.5)["cascade"]["val_ppl"] == 8.0


def test_the_verdict_names_who_is_ahead_whoever_it_is():
    assert verdict(CURVES, "seconds", "cascade") == (
        "At equal seconds (at most 20.0, what cascade has taken) the best is **cascade**: validation perplexity "
        "7.5000; then slow 7.9000. No run within it: few."
    )
    assert "(at most 200, what cascade has taken) the best is **few**: validation perplexity 7.0000; then cascade" in (
        verdict(CURVES, "trained_tokens", "cascade")
    )
    lines = equal_cost_table(CURVES, "seconds").splitlines()
    assert lines[0] == "| seconds, at most | cascade | slow | few |"
    assert lines[2] == "| 10.0 | **8.0000** | - | - |"
    assert lines[-1] == "| 30.0 | 7.5000 | **6.0000** | 7.0000 |"


def test_a_line_of_equal_cost_is_where_a_method_gets_better():
    longer = [*CURVES, _row("cascade", 40.0, 400, 7.8), _row("slow", 50.0, 500, 5.0)]
    lines = equal_cost_table(longer, "seconds").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["10.0", "15.0", "20.0", "25.0", "30.0", "50.0"]


def _result(name, variant, val, test):
    changes = {"val_change": val / 8, "test_change": None if test is None else test / 8}
    return {**_row(name, 5.0, 10, val), "variant": variant, "epochs": 1, "test_ppl": test, **changes}


def test_validation_names_the_winner_and_test_is_only_told():
    rows = [
        _result("cascade", "lr 2", 6.0, 7.0),
        _result("lora", "rank 4, lr 1", 6.2, 5.0),
        _result("lora", "rank 4, lr 2", 6.1, 6.0),
        _result("full", "lr 1", 7.0, 1.0),
    ]
    assert [(r["name"], r["val_ppl"]) for r in best_runs(rows)] == [("cascade", 6.0), ("lora", 6.1), ("full", 7.0)]
    assert winner(rows, "lora") == (
        "Validation chooses **cascade** (lr 2, 1 epoch) of 4 results: validation perplexity 6.0000 (0.7500 x base), "
        "test 7.0000 (0.8750 x base), 5.0 seconds. The best lora of 2 is that with rank 4, lr 2, 1 epoch: validation "
        "perplexity 6.1000 (0.7625 x base), test 6.0000 (0.7500 x base), 5.0 seconds."
    )
    assert winner(rows[1:], "lora") == (
        "Validation chooses **lora** (rank 4, lr 2, 1 epoch) of 3 results: validation perplexity 6.1000 (0.7625 x "
        "base), test 6.0000 (0.7500 x base), 5.0 seconds."
    )
    assert "test" not in winner([_result("cascade", "lr 2", 6.0, None)], "lora")
    assert winner([_result("full", "lr 1", 8.0, 8.0)], "lora").startswith("No result is better than the base")


@pytest.mark.parametrize("preset", ["warm", "seed"])
def test_a_row_is_what_results_json_says(tiny_runs, preset):
    folder = tiny_runs[preset]
    results = json.loads((folder / "results.json").read_text())
    final, stages, (row, *_) = results["final"], results["stages"], read_rows(folder, "x", 5 * 2**20)
    assert (row["val_ppl"], row["test_ppl"]) == (final["all_token_val_ppl"], final["all_token_test_ppl"])
    assert row["val_change"] == final["all_token_val_ppl"] / results["base"]["val_ppl"]
    assert row["seconds"] == final["base_pass_seconds"] + sum(s["seconds"] for s in stages) > 0
    assert row["process_seconds"] >= row["seconds"]
    tokens = sum(s["train_hard"] * len(s["epochs"]) for s in stages)
    assert (row["trained_tokens"], row["trained_layer_tokens"]) == (tokens, tokens * 2)
    share = final["exit_share"]
    entered = (share["stage_1"] + share["stage_2"]) + share["stage_2"]
    assert row["layers_per_token"] == pytest.approx(results["base"]["layers"] + 2 * entered)
    assert row["trained_parameters"] == sum(s["trainable_parameters"] for s in stages)
    assert (row["peak_bytes"], row["merged"], row["variant"]) == (5 * 2**20, False, f"lr {results['settings']['lr']}")
    base = base_row(row)
    assert (base["val_ppl"], base["test_ppl"]) == (results["base"]["val_ppl"], final["base_test_ppl"])


def test_a_run_that_was_interrupted_does_not_know_its_whole_time(tiny_runs, tmp_path):
    for name in ("results.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((tiny_runs["warm"] / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"event": "resume"}\n')
    assert read_rows(tmp_path, "x")[0]["process_seconds"] is None


def test_what_was_measured_as_one_plain_model_is_a_row_of_its_own(tmp_path):
    given = made_records.results([made_records.stage()], 1, {"lr": 1e-3, "epochs": 1, "layers_per_stage": 2}).to_dict()
    given["final"]["base_test_ppl"] = 10.0
    write_json(tmp_path / "results.json", given)
    (row,) = read_rows(tmp_path, "x")
    assert (row["merged"], row["general_rise"]) == (False, None)
    given["final"]["merged"] = {"all_token_val_ppl": 6.0, "all_token_test_ppl": 9.0, "layers_per_token": 29.0}
    given["final"]["general"] = {"dataset": "d", "tokens": 3, "base_loss": 2.0, "rise": 0.25, "merged_rise": 0.5}
    write_json(tmp_path / "results.json", given)
    row, merged = read_rows(tmp_path, "x")
    assert (row["name"], row["val_ppl"], row["general_rise"]) == ("x", 7.0, 0.25)
    different = {name: value for name, value in merged.items() if row[name] != value}
    assert different == {
        "name": "x merged", "val_ppl": 6.0, "val_change": 6.0 / 8.0, "test_ppl": 9.0, "test_change": 0.9,
        "layers_per_token": 29.0, "merged": True, "general_rise": 0.5,
    }  # fmt: skip


def test_tables_and_plot(tiny_runs, tmp_path):
    rows = [{**read_rows(tiny_runs[name], name)[0], "best": name == "warm"} for name in ("warm", "seed")]
    table = runs_table([base_row(rows[0]), *rows], list(COLUMNS), mark_best=True)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["base", "**warm**", "seed"]
    assert "rise on other text" not in table  # nobody has measured it
    shown = runs_table([{**rows[0], "general_rise": -0.25, "peak_bytes": 3 * 2**20}], ["general_rise", "peak_bytes"])
    assert shown.splitlines()[2] == "| -0.2500 | 3 |"
    write_rows(tmp_path, "test", [base_row(rows[0]), *rows])
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["val_ppl"] for r in record["rows"][1:]] == [r["val_ppl"] for r in rows]
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["val_ppl"]) for line in lines[1:]] == [r["val_ppl"] for r in rows]
    shown = plot_lines(tmp_path / "plot.png", rows, [("seconds", "seconds", True), ("trained_tokens", "tokens", True)])
    assert shown == "![plot](plot.png)"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    open_folder(tmp_path / "new", "sweep")
    open_folder(tmp_path / "new", "sweep")
    with pytest.raises(InputError, match="exists and is not the folder of a baselines comparison"):
        open_folder(tmp_path / "new", "baselines")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match="exists and is not the folder of a sweep comparison"):
            open_folder(tmp_path / name, "sweep")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
