"""Killed at any moment and resumed: the same bits as a run nobody disturbed. Real processes, real signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_faults import Forked, differences, epochs_told


@pytest.fixture(scope="module")
def settings(tiny_base, tiny_data):
    # Every step ends in a checkpoint, so that a kill may fall anywhere, into the writing of one too.
    return [
        "--base", str(tiny_base), "--dataset", str(tiny_data), "--seq-len", "32", "--train-blocks", "40",
        "--val-blocks", "8", "--layers-per-stage", "2", "--epochs", "2", "--batch-tokens", "32", "--lr", "3e-3",
        "--dtype", "float32", "--device", "cpu", "--num-stages", "2", "--checkpoint-minutes", "0.0000001", 
        "--min-improvement", "0", "--patience", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def train(server, settings, tmp_path_factory):
    """Starts a training in ``out`` with ``settings`` or those given, and more flags."""
    environment = {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache")}  # as of every test

    def start(out: Path, *more: str, settings: list[str] = settings) -> Forked:
        return server.start("train", *settings, "--out", out, *more, environment=environment)

    return start


def _ended(process: Forked | subprocess.Popen, code: int = 0) -> str:
    """What it has said."""
    output = "".join(process.communicate(timeout=240))
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    _ended(train(out))
    return out


def _assert_same(one: Path, other: Path) -> None:
    assert differences(one, other) == []
    assert epochs_told(one) == epochs_told(other)  # no epoch is told twice


def _wait_for(out: Path, text: str, process: Forked | subprocess.Popen) -> None:
    """Until metrics.jsonl or the name of a finished file holds ``text``. A file being written begins with a dot."""
    for _ in range(12_000):
        metrics = out / "metrics.jsonl"
        files = (*out.glob("training/*/*"), *out.glob("*.safetensors"))
        names = " ".join(p.name for p in files if not p.name.startswith("."))
        if text in names or (metrics.exists() and text in metrics.read_text()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{text} never came")


@pytest.mark.slow
def test_killed_three_times_at_random(train, undisturbed, tmp_path):
    out, rng = tmp_path / "run", random.Random(3)
    for _ in range(3):
        process = train(out, "--resume", "auto")
        try:
            _wait_for(out, "checkpoint-", process)
            time.sleep(rng.uniform(0.0, 1.5))
        finally:
            process.kill()
            process.communicate()
        if (out / "results.json").exists():
            break
    output = _ended(train(out, "--resume", "auto"))
    assert "resumed at epoch" in output or "finished already" in output
    _assert_same(undisturbed, out)


def test_killed_with_8_bit_moments(train, settings, tmp_path):
    """Matrices of 32 x 160 are large enough to have them."""
    from conftest import save_tiny_base

    settings = [*settings, "--optimizer", "adamw8bit", "--num-stages", "1", "--epochs", "2"]
    settings[1] = str(save_tiny_base(tmp_path / "base", intermediate_size=160))
    _ended(train(tmp_path / "undisturbed", settings=settings))
    process = train(tmp_path / "run", settings=settings)
    _wait_for(tmp_path / "run", "checkpoint-", process)
    process.kill()
    process.communicate()
    checkpoints = list((tmp_path / "run").glob("training/*/checkpoint-*.safetensors"))
    assert any("U8" in {e["dtype"] for e in _entries(path)} for path in checkpoints)
    assert "resumed at epoch" in _ended(train(tmp_path / "run", "--resume", "auto", settings=settings))
    _assert_same(tmp_path / "undisturbed", tmp_path / "run")


def _entries(path: Path) -> list[dict]:
    """What the header of a safetensors file says about its tensors."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [entry for name, entry in header.items() if name != "__metadata__"]


def test_a_second_look_killed_in_each_stage(train, settings, tmp_path):
    """Whole sequences in a batch, and a third look that needs what the second has left."""
    settings = [*settings, "--stage-kind", "second-look", "--accept", "always", "--epochs", "2"]
    _ended(train(tmp_path / "undisturbed", settings=settings))
    out = tmp_path / "run"
    for stage in (1, 2):
        process = train(out, "--resume", "auto", settings=settings)
        try:
            _wait_for(out / "training" / f"stage-{stage}", "checkpoint-", process)
            time.sleep(0.1)
        finally:
            process.kill()
            process.communicate()
    output = _ended(train(out, "--resume", "auto", settings=settings))
    assert "resumed at epoch" in output or "finished already" in output
    _assert_same(tmp_path / "undisturbed", out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first(train, settings, undisturbed, tmp_path, number):
    """SIGTERM as people have it: the command by itself, not forked by the server."""
    out = tmp_path / "run"
    slow = [*settings]
    slow[slow.index("0.0000001")] = "60"  # no checkpoint but the one the signal asks for
    if number == signal.SIGTERM:
        command = [sys.executable, "-m", "cascade_fast.train", *slow, "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the bits are those of one thread
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        _wait_for(out, "checkpoint-", process)
    else:
        process = train(out, settings=slow)
        _wait_for(out, '"start"', process)
        time.sleep(0.1)  # wherever it is by now: loading, or in the base pass, or training
    process.send_signal(number)
    output = "".join(filter(None, process.communicate(timeout=120)))
    assert process.returncode in (128 + number, -number), output
    if process.returncode > 0:
        assert "--resume auto" in output
    _ended(train(out, "--resume", "auto", settings=slow))
    _assert_same(undisturbed, out)


def test_a_damaged_checkpoint_is_passed_over(train, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = train(out)
    checkpoints = out / "training" / "stage-1"
    while len(list(checkpoints.glob("checkpoint-*"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    newest = max(checkpoints.glob("checkpoint-*"))
    newest.write_bytes(newest.read_bytes()[:1000])
    output = _ended(train(out, "--resume", "auto"))
    assert "is damaged" in output
    _assert_same(undisturbed, out)


def test_a_finished_run_stays_as_it_is(train, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.json")}
    output = _ended(train(undisturbed, "--resume", "auto"))
    assert "finished already" in output
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*.json")}


def test_another_config_or_base_is_refused_with_the_difference(train, settings, undisturbed, tmp_path):
    from conftest import save_tiny_base

    output = _ended(train(undisturbed, "--resume", "auto", "--lr", "1e-3", "--hard-ratio", "0.5"), code=2)
    assert "lr was 0.003, is 0.001" in output
    assert "hard_ratio was 0.6, is 0.5" in output
    assert "it is finished: to train longer, begin a new run" in output
    other = save_tiny_base(tmp_path / "other", seed=9)
    (tmp_path / "base").symlink_to(settings[1])
    moved = [str(tmp_path / "base") if s == settings[1] else s for s in settings]
    out = tmp_path / "run"
    _ended(train(out, "--max-minutes", "0.00001", settings=moved))
    (out / "results.json").unlink()
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(other)
    output = _ended(train(out, "--resume", "auto", "--max-minutes", "0.00001", settings=moved), code=2)
    assert "the base has changed" in output


def test_a_second_run_in_the_folder_is_refused(train, settings, tmp_path):
    out, settings = tmp_path / "run", [*settings]
    settings[settings.index("--epochs") + 1] = settings[settings.index("--patience") + 1] = "10000"
    first = train(out, settings=settings)
    try:
        _wait_for(out, '"start"', first)
        output = _ended(train(out, "--resume", "auto", settings=settings), code=2)
        assert "another process is training there" in output
    finally:
        first.kill()
        first.communicate()
