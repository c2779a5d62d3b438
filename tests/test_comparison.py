"""Several runs side by side: the numbers are those of each run, and equal cost is read as it says."""

import csv
import json

import pytest

from cascade_fast.comparison.curves import plot_lines
from cascade_fast.comparison.runs import base_row, open_folder, read_run
from cascade_fast.comparison.tables import best_within, equal_cost_table, verdict, write_tables
from cascade_fast.input_checks import InputError


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


@pytest.mark.parametrize("preset", ["warm", "seed"])
def test_a_row_is_what_results_json_says(tiny_runs, preset):
    folder = tiny_runs[preset]
    results = json.loads((folder / "results.json").read_text())
    final, stages, row = results["final"], results["stages"], read_run(folder, "x")
    assert (row["val_ppl"], row["test_ppl"]) == (final["all_token_val_ppl"], final["all_token_test_ppl"])
    assert row["val_change"] == final["all_token_val_ppl"] / results["base"]["val_ppl"]
    assert row["seconds"] == final["base_pass_seconds"] + sum(s["seconds"] for s in stages) > 0
    assert row["process_seconds"] >= row["seconds"]
    tokens = sum(s["train_hard"] * len(s["epochs"]) for s in stages)
    assert (row["trained_tokens"], row["trained_layer_tokens"]) == (tokens, tokens * 2)
    share = final["exit_share"]
    entered = (share["stage_1"] + share["stage_2"]) + share["stage_2"]
    assert row["layers_per_token"] == pytest.approx(results["base"]["layers"] + 2 * entered)
    base = base_row(row)
    assert (base["val_ppl"], base["test_ppl"]) == (results["base"]["val_ppl"], final["base_test_ppl"])


def test_a_run_that_was_interrupted_does_not_know_its_whole_time(tiny_runs, tmp_path):
    for name in ("results.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((tiny_runs["warm"] / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"event": "resume"}\n')
    assert read_run(tmp_path, "x")["process_seconds"] is None


def test_tables_and_plot(tiny_runs, tmp_path):
    rows = [read_run(tiny_runs[name], name) for name in ("warm", "seed")]
    table = write_tables(tmp_path, "test", [base_row(rows[0]), *rows])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["base", "warm", "seed"]
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
