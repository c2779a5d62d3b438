"""The command line: mistakes are one line and exit code 2, before any work; what it prints where."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_fast import baselines, data, evaluate, plan, sweep, train
from cascade_fast.runtime.compute import peak_rss_bytes
from cascade_fast.runtime.console import console, say_table
from cascade_fast.runtime.files import read_json

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flags(tiny_settings):
    return [part for name, value in tiny_settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def _main(capsys, *argv):
    code = train.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--hard-ratio", "1.2"], "hard_ratio: 1.2; must be in (0, 1]"),
        (["--base", "no/such-model"], "base: 'no/such-model'; no such folder or file"),
        (["--dataset", "no-such-file.json"], "dataset: 'no-such-file.json'; no such file or folder"),
        (["--text-columns", "absent"], "text_columns: 'absent'; the dataset's columns are text"),
        (["--seq-len", "65"], "seq_len: 65;"),
        (["--seq-len", "60", "--train-blocks", "5000"], "5,000 train + 12 val asked, but"),
        (["--device", "cuda:7"], "device: 'cuda:7'; this machine has 0 CUDA GPUs"),
        (["--device", "abacus"], "device: 'abacus'; must be auto, cpu, cuda or cuda:N"),
        (["--config", "absent.yaml"], "config: 'absent.yaml' cannot be read"),
        (
            ["--stage-kind", "second-look", "--layers-per-stage", "4"],
            "layers_per_stage: 4; a second look copies the last",
        ),
        (["--stage-kind", "second-look", "--init", "random"], "init: 'random'; a second look starts as the base's own"),
        (["--init", "identity", "--head", "own"], "init: identity needs head: shared"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, flags, tmp_path, monkeypatch, wrong, said):
    if "cuda:7" in wrong:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    out = tmp_path / "run"
    code, _, err = _main(capsys, *flags, "--out", str(out), *wrong)
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_folders_that_are_no_run_or_a_run_already(capsys, flags, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    code, _, err = _main(capsys, *flags, "--out", str(tmp_path / "photos"))
    assert (code, "exists and is not the folder of a run" in err) == (2, True)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    (tmp_path / "file").write_text("")
    code, _, err = _main(capsys, *flags, "--out", str(tmp_path / "file"), "--resume", "auto")
    assert (code, "exists and is not the folder of a run" in err) == (2, True)
    assert _main(capsys, *flags, "--out", str(tmp_path / "run"), "--num-stages", "1")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, _, err = _main(capsys, *flags, "--out", str(tmp_path / "run"), "--num-stages", "1")
    assert (code, "holds a run already: add --resume auto" in err) == (2, True)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_debug_shows_the_traceback(flags):
    from cascade_fast.input_checks import InputError

    with pytest.raises(InputError):
        train.main([*flags, "--hard-ratio", "7", "--debug"])


def test_an_unknown_flag_is_argparse_s_error(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--hard-ration", "0.5"])
    assert stop.value.code == 2
    assert "--hard-ration" in capsys.readouterr().err


@pytest.mark.parametrize("command", [train, data, baselines, sweep, plan])
def test_an_unknown_flag_says_which_is_meant(capsys, command):
    with pytest.raises(SystemExit) as stop:
        command.main(["--learning-rate", "1", "--max_seq_length=5", "--frobnicate", "--layers-per-stag", "2"])
    assert stop.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert "--learning-rate: did you mean --lr (peak learning rate)?" in error
    assert "--max_seq_length: did you mean --seq-len (most tokens in a sequence)?" in error
    assert "--layers-per-stag: did you mean --layers-per-stage (" in error
    assert "--frobnicate: " not in error


def test_every_command_has_a_console_script():
    section = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0]
    scripts = dict(re.findall(r'^(\S+) = "(\S+)"$', section, re.MULTILINE))
    commands = {p.stem for p in (ROOT / "cascade_fast").glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    assert len(commands) == 13
    assert scripts == {f"cascade-fast-{name.replace('_', '-')}": f"cascade_fast.{name}:main" for name in commands}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_run_is_quiet_and_line_based_without_a_terminal(capsys, flags, tmp_path):
    code, out, err = _main(capsys, *flags, "--out", str(tmp_path / "run"))
    assert code == 0
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert any(line.startswith("computing on cpu in float32 (asked for)") for line in lines)
    assert any("epoch 1: train_loss=" in line for line in lines)
    run = tmp_path / "run"
    assert lines[-5:] == [
        f"report: {run / 'report.md'}",
        "sample text: in the report",
        "next:",
        f'  python -m cascade_fast.generate {run} "Your text" --compare-base',
        f"  python -m cascade_fast.evaluate {run}",
    ]
    assert len(lines) < 40
    assert "Traceback" not in err


def test_a_run_from_before_shuffle_keeps_its_order(capsys, flags, tmp_path):
    """Its saved settings do not name it: evaluated on the blocks it was trained beside, and resumed only so."""
    run = tmp_path / "run"
    command = [*flags, "--out", str(run), "--num-stages", "1"]
    assert _main(capsys, *command, "--shuffle", "off")[0] == 0
    config = read_json(run / "config.json")
    assert config["settings"].pop("shuffle") == "off"
    (run / "config.json").write_text(json.dumps(config))
    expected = json.loads((run / "results.json").read_text())["base"]["val_ppl"]
    assert evaluate.main([str(run), "--no-flops", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["rows"][0]["perplexity"]
    assert found == pytest.approx(expected, rel=1e-4)
    config["settings"]["shuffle"] = "on"  # other blocks: the check can fail
    (run / "config.json").write_text(json.dumps(config))
    assert evaluate.main([str(run), "--no-flops", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["rows"][0]["perplexity"]
    assert found != pytest.approx(expected, rel=1e-3)
    del config["settings"]["shuffle"]
    (run / "config.json").write_text(json.dumps(config))
    code, out, _ = _main(capsys, *command, "--resume", "auto", "--shuffle", "off")
    assert (code, "finished already" in out) == (0, True)
    code, _, err = _main(capsys, *command, "--resume", "auto")
    assert (code, "shuffle was 'off', is 'on'" in err) == (2, True)


def test_all_blocks_are_counted_saved_and_found_again(capsys, flags, tmp_path):
    run = tmp_path / "run"
    command = [*flags, "--out", str(run), "--num-stages", "1", "--epochs", "1", "--train-blocks", "all"]
    assert _main(capsys, *command)[0] == 0
    settings = json.loads((run / "config.json").read_text())["settings"]
    tokens = json.loads((run / "results.json").read_text())["tokens"]
    assert settings["train_blocks"] == tokens["train"] // 32 > 600
    assert (tokens["val"], tokens["test"]) == (12 * 32, 12 * 32)
    code, out, _ = _main(capsys, *command, "--resume", "auto")
    assert (code, "finished already" in out) == (0, True)
    assert plan.main(["--train-blocks", "all"]) == 2
    assert "train_blocks: all; a plan does not read the text: must be a number" in capsys.readouterr().err
    code, _, err = _main(capsys, *flags, "--out", str(tmp_path / "no"), "--train-blocks", "all", "--val-blocks", "720")
    assert (code, "train_blocks: the split would be empty" in err, (tmp_path / "no").exists()) == (2, True, False)


def test_the_default_folder_is_under_runs(capsys, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _format: "20260101-000000")  # all within one second
    assert _main(capsys, *flags, "--num-stages", "1")[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-warm")
    # Nothing unfinished is left, so --resume auto begins a new run.
    assert _main(capsys, *flags, "--num-stages", "1", "--resume", "auto", "--lr", "1e-3")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_flags_are_answered_before_torch_is_loaded():
    script = (
        "import sys; from cascade_fast import train; train.main(['--hard-ratio', '9']); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert result.stdout.strip() == "False"
    assert "hard_ratio: 9.0" in result.stderr


def test_help_is_printed_before_torch_is_loaded():
    script = """
import contextlib, sys
from cascade_fast import baselines, data, evaluate, generate, plan, report, sweep, train
for command in (baselines, data, evaluate, generate, plan, report, sweep, train):
    with contextlib.suppress(SystemExit):
        command.main(["--help"])
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.count("usage: ") == 8
    assert result.stdout.splitlines()[-1] == "False"


def test_peak_memory_is_the_process_s_own():
    """Not that of whoever started it, which ru_maxrss would be."""
    room = bytearray(400 * 2**20)
    room[:: 2**12] = b"x" * len(room[:: 2**12])  # every page
    code = "from cascade_fast.runtime.compute import peak_rss_bytes; print(peak_rss_bytes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(run.stdout) < 300 * 2**20
    assert peak_rss_bytes() > len(room)


def test_a_run_that_keeps_no_stage_says_what_to_try(capsys, flags, tmp_path):
    code, out, _ = _main(capsys, *flags, "--out", str(tmp_path / "run"), "--min-improvement", "0.9")
    assert code == 0
    assert "0 stage(s) kept" in out
    last = out.splitlines()[-1]
    assert last.startswith("No stage was kept: the cascade is its base. Worth a try, one at a time: ")
    assert "--lr 0.001" in last
    assert last.replace("`", "") in (tmp_path / "run" / "report.md").read_text().replace("`", "")


def test_samples_that_cannot_be_made_cost_nothing_else(capsys, flags, tmp_path, monkeypatch):
    def no_memory(*_args, **_settings):
        raise MemoryError("no room")

    monkeypatch.setattr("cascade_fast.reporting.samples.load_model", no_memory)
    code, out, _ = _main(capsys, *flags, "--out", str(tmp_path / "run"), "--num-stages", "1")
    assert code == 0
    assert "sample text: none, MemoryError: no room" in out
    assert out.splitlines()[-3] == "next:"
    assert "## Sample text" not in (tmp_path / "run" / "report.md").read_text()
    monkeypatch.undo()
    # The same command finds the run finished, and makes what is missing.
    code, out, _ = _main(capsys, *flags, "--out", str(tmp_path / "run"), "--num-stages", "1", "--resume", "auto")
    assert (code, "finished already" in out) == (0, True)
    assert "## Sample text" in (tmp_path / "run" / "report.md").read_text()


def test_names_are_shown_and_not_obeyed(capsys, flags, tmp_path):
    code, out, err = _main(capsys, *flags, "--out", str(tmp_path / "run"), "--dataset", "no\x1b[31m\nsuch.json")
    assert (code, out) == (2, "")
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("width", [32, 80])
def test_a_table_loses_nothing_in_any_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(console, "_width", None)  # of COLUMNS when it was made: pytest-xdist sets that
    say_table("a title", ["name", "first", "second"], [["[b]x[/b]", "1" * 12, "2" * 20], ["y\x1b", "3" * 12, ""]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    for part in ("a title", "[b]x[/b]", "y\\x1b", "first", "second", "1" * 12, "2" * 20, "3" * 12):
        assert part in out
    if width == 80:
        assert [line.rstrip() for line in out.splitlines()[1:]] == [
            "name             first                second",
            "────────────────────────────────────────────",
            "[b]x[/b]  111111111111  22222222222222222222",
            "y\\x1b     333333333333",
        ]
