"""The two commands that compare runs, and the criterion ``random``."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from cascade_fast import baselines, cascade, sweep
from cascade_fast.comparison.grid import make_grid
from cascade_fast.comparison.methods import METHODS, Grid, choose_methods, plan_trainings
from cascade_fast.criteria import random_scores
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.runtime.compute import Compute, peak_rss_bytes
from cascade_fast.selection import hard_count
from cascade_fast.settings import make_settings


@pytest.fixture
def flags(tiny_settings):
    changed = {**tiny_settings, "num_stages": 1, "train_blocks": 16, "val_blocks": 6}
    del changed["epochs"]
    return [part for name, value in changed.items() for part in ("--" + name.replace("_", "-"), str(value))]


def _results(folder):
    return json.loads((folder / "results.json").read_text())


# --- criterion random ------------------------------------------------------------------------------------------------


def test_random_scores_are_uniform_and_each_token_s_own():
    sequence = torch.arange(200, dtype=torch.int32).repeat_interleave(100)
    position = torch.arange(100, dtype=torch.int32).repeat(200)
    score = random_scores(sequence, position, seed=7, split="train")
    assert score.dtype == torch.float32
    assert score.unique().numel() > 19_900
    counts = torch.histc(score, bins=10, min=0.0, max=1.0)
    assert (counts - 2000).abs().max() < 200
    assert 0.0 <= score.min() < score.max() < 1.0
    rows = score.view(200, 100)
    for one, other in ((rows[:, :-1], rows[:, 1:]), (rows[:-1], rows[1:])):
        assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].abs() < 0.03
    # Not of the batch: any tokens, in any order.
    some = torch.randperm(20_000)[:77]
    assert torch.equal(random_scores(sequence[some], position[some], seed=7, split="train"), score[some])
    for other in (
        {"seed": 8, "split": "train"},
        {"seed": 7, "split": "val"},
        {"seed": 7, "split": "train", "stage": 1},
    ):
        different = random_scores(sequence, position, **other)
        assert torch.corrcoef(torch.stack((score, different)))[0, 1].abs() < 0.03


@pytest.mark.parametrize("kind", ["append", "second-look"])
def test_a_run_on_random_tokens(tiny_settings, tmp_path, monkeypatch, kind):
    settings = {**tiny_settings, "stage_kind": kind, "cache_dir": str(tmp_path / "cache"), "accept": "always"}
    settings["epochs"] = 1
    cascade.run_cascade(make_settings({**settings, "out": str(tmp_path / "entropy")}))
    random = {**settings, "criterion": "random"}
    folder = cascade.run_cascade(make_settings({**random, "out": str(tmp_path / "one")})).path
    results, entropy = _results(folder), _results(tmp_path / "entropy")
    assert results["final"]["base_pass_reused"]  # the pass of the entropy
    assert results["base"]["val_ppl"] == entropy["base"]["val_ppl"]
    first, second = results["stages"]
    assert first["train_hard"] == entropy["stages"][0]["train_hard"] == hard_count(0.6, 1280)
    assert first["threshold"] == pytest.approx(0.6, abs=0.05)
    assert second["train_hard"] == hard_count(0.6, first["train_hard"])
    assert second["threshold"] == pytest.approx(0.6, abs=0.05)  # new noise, not what is left of the old
    monkeypatch.setattr("cascade_fast.stages.exits.TOKENS_AT_ONCE", 64)  # other batches
    monkeypatch.setattr(cascade, "TOKENS_AT_ONCE", 64)
    again = _results(cascade.run_cascade(make_settings({**random, "out": str(tmp_path / "two")})).path)
    for one, two in zip(results["stages"], again["stages"], strict=True):
        assert [one[n] for n in ("threshold", "val_hard", "exit_share")] == [
            two[n] for n in ("threshold", "val_hard", "exit_share")
        ]
    if kind == "append":
        with pytest.raises(InputError, match="criterion: 'random'; must be one of cosine, entropy"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(InputError, match="criterion: 'random'"):
            CascadeConfig(criterion="random")


# --- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_trains_every_method_and_goes_on(flags, tmp_path, capsys):
    out = tmp_path / "compared"
    command = [*flags, "--out", str(out), "--full-lrs", "1e-3", "--lora-ranks", "4", "--lora-lrs", "2e-3"]
    assert baselines.main([*command, "--only", "cascade", "--epochs-list", "1", "2"]) == 0
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [r["epochs"] for r in rows] == [None, 1, 2]
    assert rows[2]["base_pass_seconds"] == rows[1]["base_pass_seconds"] > 0
    kept = (out / "cascade-1" / "results.json").stat().st_mtime_ns
    assert baselines.main([*command, "--epochs-list", "1"]) == 0, capsys.readouterr().err
    assert (out / "cascade-1" / "results.json").stat().st_mtime_ns == kept
    variants = {"lora": "-r4-lr0.002", "full": "-lr0.001"}
    runs = {*(f"{method}{variants.get(method, '')}-1" for method in METHODS), "cascade-2"}
    assert {p.name for p in out.iterdir() if p.is_dir()} == runs
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["base", *METHODS]
    for row in rows[1:]:
        final = _results(out / row["folder"])["final"]
        assert (row["val_ppl"], row["test_ppl"]) == (final["all_token_val_ppl"], final["all_token_test_ppl"])
    tokens = {row["folder"]: row["trained_tokens"] for row in rows[1:]}
    assert tokens["dense-append-1"] == tokens["dense-second-look-1"] == 16 * 32
    assert tokens["lora-r4-lr0.002-1"] == tokens["full-lr0.001-1"] == 16 * 32
    assert tokens["random-1"] == tokens["cascade-1"] == hard_count(0.6, 16 * 32)
    seconds = {row["folder"]: row["base_pass_seconds"] for row in rows[1:]}
    assert seconds["full-lr0.001-1"] == seconds["lora-r4-lr0.002-1"] == 0 < seconds["cascade-1"]
    assert seconds["cascade-1"] == seconds["random-1"] == seconds["dense-append-1"]
    settings = {row["folder"]: row["settings"] for row in rows[1:]}
    assert (settings["full-lr0.001-1"]["lr"], settings["dense-second-look-1"]["lr"]) == (1e-3, 4e-4)
    lora = settings["lora-r4-lr0.002-1"]
    assert (lora["lr"], lora["lora_rank"], lora["lora_alpha"], lora["lora_targets"]) == (2e-3, 4, 32.0, [])
    assert settings["seed-1"]["batch_tokens"] == 32
    by_name = {row["name"]: row for row in rows}
    whole = _results(out / "full-lr0.001-1")["base"]["parameters"]
    assert (by_name["full"]["trained_parameters"], by_name["base"]["trained_parameters"]) == (whole, 0)
    assert by_name["lora"]["trained_parameters"] == 3 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert {name for name, row in by_name.items() if row["merged"]} == {"base", "lora", "full"}
    assert {row["layers_per_token"] for row in rows if row["name"] in ("base", "lora", "full")} == {3.0}
    report = (out / "report.md").read_text()
    shown = (
        "At equal seconds",
        "At equal trained tokens",
        "![curves](curves.png)",
        "dense-second-look",
        "**lora**",
    )
    for part in shown:
        assert part in report
    assert (out / "curves.png").is_file()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--only", "best"], "only: 'best'; must be one of cascade, dense-append,"),
        (["--skip", *METHODS], "only, skip: no method is left"),
        (["--epochs-list", "0"], "epochs_list: [0]; must be different numbers, each at least 1"),
        (["--epochs-list", "2", "2"], "epochs_list: [2, 2]; must be different"),
        (["--epochs", "2", "--epochs-list", "1", "3"], "epochs, epochs_list: 2 and [1, 3]; give one of them"),
        (["--epochs", "0"], "epochs: 0; must be at least 1"),
        (["--resume", "auto"], "resume: auto; leave it out: a comparison always goes on where it was"),
        (["--criterion", "random"], "criterion: 'random'; the method random is the same"),
        (["--full-lrs", "-1"], "full_lrs: [-1.0]; must be different numbers, each above 0"),
        (["--lora-lrs", "1e-3", "nan"], "lora_lrs: [0.001, nan]; must be different numbers, each above 0"),
        (["--lora-lrs", "1e-3", "0.001"], "lora_lrs: [0.001, 0.001]; must be different numbers"),
        (["--lora-ranks", "0"], "lora_ranks: [0]; must be different numbers, each at least 1"),
        (["--base-quantization", "nf4"], "base_quantization: 'nf4'; must be none for lora (or --skip lora full)"),
        (["--device", "cuda:99", "--skip", "lora"], "device: 'cuda:99'; this machine has"),
        (["--layers-per-stage", "4"], "layers_per_stage: 4; a second look copies the last"),
        (["--base", "no/such-model"], "base: 'no/such-model'; no such folder or file"),
    ],
)
def test_mistakes_of_baselines(flags, tmp_path, capsys, wrong, said):
    out = tmp_path / "compared"
    assert baselines.main([*flags, "--out", str(out), *wrong]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("asked", "file", "epochs"),
    [
        ([], "", [1, 2]),
        (["--epochs", "3"], "", [3]),
        (["--epochs-list", "3", "1"], "", [1, 3]),
        ([], "epochs: 4\n", [4]),
        (["--epochs", "3"], "epochs: 4\n", [3]),
        (["--epochs-list", "1", "3"], "epochs: 4\n", [1, 3]),
    ],
)
def test_the_epochs_of_baselines(flags, tmp_path, monkeypatch, asked, file, epochs):
    (tmp_path / "run.yaml").write_text(file)
    planned = []
    monkeypatch.setattr(
        "cascade_fast.comparison.baselines.run_baselines", lambda _folder, trainings: planned.extend(trainings)
    )
    command = [*flags, "--out", str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml"), *asked]
    assert baselines.main([*command, "--only", "cascade", "seed", "--train-blocks", "all"]) == 0
    assert [t.settings.epochs for t in planned if t.method == "cascade"] == epochs
    (seed,) = (t.settings for t in planned if t.method == "seed")  # its epochs are its own; the text is the same
    assert (seed.epochs, seed.shuffle, seed.train_blocks) == (1, "on", planned[0].settings.train_blocks)


def test_the_grids_of_lora_and_the_full_fine_tune(tiny_settings):
    settings = make_settings({**tiny_settings, "out": "x", "preset": "second-look", "batch_tokens": 256})
    trainings = plan_trainings(settings, choose_methods(["cascade", "lora", "full"], []), [2, 1], Grid())
    names = [t.settings.out for t in trainings]
    rates = ("0.0006", "0.001", "0.002")
    assert names == [
        *("x/cascade-1", "x/cascade-2"),
        *(f"x/lora-r{rank}-lr{lr}-{epochs}" for rank in (16, 64) for lr in rates for epochs in (1, 2)),
        *(f"x/full-lr{lr}-{epochs}" for lr in ("7e-05", "0.00013", "0.00025") for epochs in (1, 2)),
    ]
    assert {(t.method, t.settings.batch_tokens) for t in trainings} == {("cascade", 256), ("lora", 512), ("full", 512)}
    assert {t.settings.lora_alpha for t in trainings if t.method == "lora"} == {32.0}


@pytest.mark.parametrize(
    ("asked", "file", "tokens"), [([], "", 512), (["--batch-tokens", "96"], "", 96), ([], "batch_tokens: 80\n", 80)]
)
def test_the_batch_of_lora_and_the_full_fine_tune(flags, tmp_path, monkeypatch, asked, file, tokens):
    (tmp_path / "run.yaml").write_text(file)
    planned = []
    monkeypatch.setattr(
        "cascade_fast.comparison.baselines.run_baselines", lambda _folder, trainings: planned.extend(trainings)
    )
    place = flags.index("--batch-tokens")
    command = [*flags[:place], *flags[place + 2 :], "--out", str(tmp_path / "out"), "--preset", "second-look"]
    assert baselines.main([*command, "--config", str(tmp_path / "run.yaml"), "--only", "lora", "full", *asked]) == 0
    assert {t.settings.batch_tokens for t in planned} == {tokens}


def test_dense_methods_have_no_adapter_whatever_the_cascade_has(tiny_settings):
    settings = {**tiny_settings, "out": "x", "stage_kind": "second-look", "adapter": "lora"}
    trainings = plan_trainings(
        make_settings(settings), choose_methods(["cascade", "dense-append", "dense-second-look"], []), [1], Grid()
    )
    assert [t.settings.adapter for t in trainings] == ["lora", "none", "none"]


def test_without_peft_nothing_is_begun(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    out = tmp_path / "compared"
    assert baselines.main([*flags, "--out", str(out)]) == 2
    assert "the method lora needs peft: pip install peft" in capsys.readouterr().err
    assert not out.exists()
    assert baselines.main([*flags, "--out", str(out), "--only", "cascade", "--epochs", "1"]) == 0


def test_validation_chooses_among_the_runs_of_a_method(flags, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "compared"
    grid = ["--lora-ranks", "4", "--lora-lrs", "1e-5", "1e-3", "--epochs-list", "1", "2"]
    command = [*flags, "--out", str(out), "--only", "cascade", "lora", *grid]
    assert baselines.main(command) == 0
    rows = json.loads((out / "comparison.json").read_text())["rows"][1:]
    assert [row["name"] for row in rows] == ["cascade"] * 2 + ["lora"] * 4
    loras = rows[2:]
    best = min(loras, key=lambda row: row["val_ppl"])
    assert [row["folder"] for row in loras if row["best"]] == [best["folder"]]
    assert best["variant"] == "rank 4, lr 0.001"
    first = min(rows, key=lambda row: row["val_ppl"])
    report = (out / "report.md").read_text()
    assert f"Validation chooses **{first['name']}** ({first['variant']}, " in report
    assert f"test {best['test_ppl']:.4f} ({best['test_change']:.4f} x base)" in report
    assert "what lora has taken) the best is **" in report
    ranked = report.partition("The best run of each method")[2].split("\n\n")[1].splitlines()[2:]
    results = {"base": first["base_val_ppl"], **{row["name"]: row["val_ppl"] for row in rows if row["best"]}}
    assert [line.split("|")[1].strip() for line in ranked] == sorted(results, key=results.__getitem__)
    # Again: all are found, with the memory that they took; another setting is another run.
    kept = {row["folder"]: (out / row["folder"] / "results.json").stat().st_mtime_ns for row in rows}
    assert baselines.main(command) == 0
    again = json.loads((out / "comparison.json").read_text())["rows"][1:]
    assert again == rows
    assert kept == {name: (out / name / "results.json").stat().st_mtime_ns for name in kept}
    assert baselines.main([*command, "--weight-decay", "0.5"]) == 2
    assert "weight_decay was 0.01, is 0.5" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process cannot be reset")
def test_a_row_s_peak_is_that_of_its_run_alone(flags, tmp_path):
    pytest.importorskip("peft")
    held = torch.ones(2**27)  # 512 MiB, before the runs
    before = peak_rss_bytes()
    del held
    out = tmp_path / "compared"
    command = [*flags, "--out", str(out), "--epochs", "1", "--lora-ranks", "4", "--lora-lrs", "1e-3", "2e-3"]
    assert baselines.main([*command, "--only", "cascade", "lora"]) == 0
    base, *rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert base["peak_bytes"] is None
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["peak_bytes"] < before - 2**28
    # What a run that goes on has held before is not known.
    (out / "cascade-1" / "results.json").unlink()
    (out / "comparison.json").write_text('{"command": "baselines", "rows": []}')
    assert baselines.main([*command, "--only", "cascade"]) == 0
    assert json.loads((out / "comparison.json").read_text())["rows"][1]["peak_bytes"] is None


def test_where_the_peak_cannot_be_reset_there_is_none(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Compute, "reset_peak_memory", lambda _self: False)
    out = tmp_path / "compared"
    assert baselines.main([*flags, "--out", str(out), "--only", "cascade", "--epochs", "1"]) == 0
    assert json.loads((out / "comparison.json").read_text())["rows"][1]["peak_bytes"] is None


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_the_grid_and_takes_up_what_is_missing(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    command = [*flags, "--epochs", "1", "--out", str(out), "--cache-dir", str(tmp_path / "cache")]
    grid = ["--hard-ratio", "0.3", "0.9", "--criterion", "entropy", "random"]
    whole, started = cascade.run_cascade, []

    def interrupted(config):
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(config.out)
        return whole(config)

    monkeypatch.setattr(cascade, "run_cascade", interrupted)
    assert sweep.main([*command, *grid]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(cascade, "run_cascade", whole)
    before = {path: (out / path / "results.json").stat().st_mtime_ns for path in started}
    assert sweep.main([*command, *grid]) == 0
    assert before == {path: (out / path / "results.json").stat().st_mtime_ns for path in started}
    rows = json.loads((out / "comparison.json").read_text())["rows"][1:]
    assert [r["name"] for r in rows[:2]] == ["entropy, r = 0.3", "entropy, r = 0.9"]
    assert len(rows) == 4
    for row in rows:
        results = _results(out / row["folder"])
        assert row["val_ppl"] == results["final"]["all_token_val_ppl"]
        assert row["trained_tokens"] == hard_count(row["hard_ratio"], 16 * 32)
        share = results["final"]["exit_share"].get("stage_1", 0.0)
        assert row["layers_per_token"] == pytest.approx(3 + 2 * share)
    assert len(list((tmp_path / "cache" / "base-pass").iterdir())) == 1  # random has that of the entropy
    report = (out / "report.md").read_text()
    assert f"{min(r['val_ppl'] for r in rows):.4f}" in report
    assert "![sweep](sweep.png)" in report
    assert sweep.main([*command, "--hard-ratio", "0.3", "0.5"]) == 0  # another grid in the same folder
    assert len(json.loads((out / "comparison.json").read_text())["rows"]) == 3


def test_a_sweep_over_all_layers_says_so(flags, tmp_path):
    out, place = tmp_path / "sweep", flags.index("--layers-per-stage")
    command = [*flags[:place], *flags[place + 2 :], "--epochs", "1", "--stage-kind", "second-look", "--out", str(out)]
    assert sweep.main([*command, "--layers-per-stage", "2", "3", "all"]) == 0
    rows = json.loads((out / "comparison.json").read_text())["rows"][1:]
    assert {row["name"]: row["folder"] for row in rows} == {
        f"{layers} layers, r = 0.6": f"second-look-L{layers}-entropy-lr0.003-r0.6" for layers in (2, 3, "all")
    }
    assert [row["settings"]["layers_per_stage"] for row in rows] == [2, 3, 3]
    report = (out / "report.md").read_text()
    assert "| all layers, r = 0.6 |" in report


def test_a_sweep_over_ways_of_choosing(flags, tmp_path):
    """Whether choosing pays, in one command: the same tokens' worth chosen, of the text's beginning, and of all."""
    out = tmp_path / "sweep"
    command = [*flags, "--epochs", "1", "--stage-kind", "second-look", "--num-stages", "1", "--accept", "always"]
    grid = ["--hard-ratio", "0.5", "1", "--train-criterion", "entropy", "first", "--easy-tokens", "skip", "forward"]
    asked = make_grid(
        {"out": str(out), "num_stages": 1, "hard_ratio": [0.5, 1], "train_criterion": ["entropy", "margin"],
         "criterion": ["entropy", "margin"]}
    )  # fmt: skip
    assert len(asked) == 6  # at 1 nobody chooses
    assert sweep.main([*command, *grid, "--out", str(out), "--cache-dir", str(tmp_path / "cache")]) == 0
    rows = json.loads((out / "comparison.json").read_text())["rows"][1:]
    half = ["chosen by entropy, easy ones skip", "chosen by entropy, easy ones forward"]
    half += [name.replace("entropy", "first") for name in half]
    cascades = [row["name"] for row in rows if not row["merged"]]
    assert sorted(cascades) == sorted([*(f"{name}, r = 0.5" for name in half), "all tokens, r = 1"])
    assert {row["name"] for row in rows if row["merged"]} == {f"{name} merged" for name in cascades}
    assert {row["trained_tokens"] for row in rows} == {8 * 32, 16 * 32}
    assert {row["folder"] for row in rows} == {
        *(f"second-look-L2-entropy{later}-lr0.003-r0.5" for later in ("", "-forward", "-first", "-first-forward")),
        "second-look-L2-entropy-lr0.003-r1",
    }
    # Of whole sequences no token is easy: both ways train the same stage.
    of_first = {row["val_ppl"] for row in rows if row["merged"] and "first" in row["name"]}
    assert max(of_first) == pytest.approx(min(of_first), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--hard-ratio", "0.3", "1.3"], "hard_ratio: 1.3; must be in (0, 1]"),
        (["--hard-ratio", "0.3", "0.3"], "a value is given twice"),
        (["--criterion", "cosine", "--lr", "1e-3", "high"], "lr: 'high'; must be a number"),
        (["--stage-kind", "append", "second-look", "--layers-per-stage", "4"], "a second look copies the last"),
        (["--resume", "auto"], "resume: 'auto'; leave it out"),
    ],
)
def test_mistakes_of_a_sweep(flags, tmp_path, capsys, wrong, said):
    out = tmp_path / "sweep"
    assert sweep.main([*flags, "--out", str(out), *wrong]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(InputError, match="hard_ratio: no value"):
        make_grid({"out": str(out), "hard_ratio": []})


def test_an_unknown_criterion_is_argparse_s_error(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--criterion", "cosine", "fame"])
    assert "invalid choice: 'fame'" in capsys.readouterr().err
