"""Several processes on gloo: they train what one does. Real processes; see several_worker.py."""

import itertools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torchrun import TORCHRUN, environment, together

from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.runtime import processes as processes_module
from cascade_fast.runtime.files import load_tensors
from cascade_fast.runtime.processes import ALONE, Processes
from cascade_fast.runtime.run_folder import read_results
from cascade_fast.settings import make_settings
from cascade_fast.training.data_parallel import own_parts
from cascade_fast.training.sharding import check_sharding

ADAPTER = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 8.0}
# Not auto, which goes by how fast the machine is at the moment.
LOOK = {"stage_kind": "second-look", "kv": "recompute"}
RUNS = {
    "append": {"preset": "warm", "num_stages": 2, "min_improvement": 0.0},
    "look": {**LOOK, "hard_ratio": 0.6, "accept": "always", "num_stages": 2},
    "adapters": {**LOOK, **ADAPTER, "hard_ratio": 0.6, "easy_tokens": "forward", "num_stages": 1, "accept": "always"},
    "8 bit": {"num_stages": 1, "optimizer": "adamw8bit", "micro_batch_tokens": 24, "grad_clip": 0.5},
    "sharded": {**LOOK, "accept": "always", "num_stages": 1, "shard": "fsdp", "micro_batch_tokens": 40},
    "chats": {**LOOK, **ADAPTER, "num_stages": 1, "hard_ratio": 1.0},
}
SMALL = {"train_blocks": 30, "epochs": 1, "test_blocks": 8, "lr": 1e-3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def _together(server, count: int, runs: list[dict], folder: Path, cache: str) -> str:
    file = folder / f"runs-{count}.json"
    file.write_text(json.dumps(runs))
    worker = Path(__file__).with_name("several_worker.py")
    done = together(server, count, worker, file, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    """Rows of a question and an answer, of their own lengths; only the answer counts."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    counts = (" ".join(map(str, range(n % 7 + 1))) for n in range(200))
    rows = [{"prompt": "count " + "na " * (n % 4), "completion": count} for n, count in enumerate(counts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(server, tiny_base, tiny_data, answers, tmp_path_factory, cache) -> dict[str, Path]:
    """``RUNS`` of one process, in the folder ``one``, of two, in ``two`` and again in ``again``."""
    import torch
    from conftest import _settings

    folder = tmp_path_factory.mktemp("several")

    def settings(name: str, where: str, **alone: str) -> dict:
        of_kind = {}
        if name == "chats":
            of_kind = dict.fromkeys(("train_blocks", "val_blocks", "test_blocks"))
            of_kind |= {"dataset": str(answers), "train_tokens": 900, "val_tokens": 200}
        given = {
            **_settings(tiny_base, tiny_data),
            **SMALL,
            **RUNS[name],
            **of_kind,
            **alone,
            "out": str(folder / where / name),
        }
        return {key: value for key, value in given.items() if value is not None}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in RUNS:
            run_cascade(make_settings(settings(name, "one", shard="none")))
    finally:
        torch.set_num_threads(threads)
    runs = [settings(name, "two") for name in RUNS] + [settings("look", "again")]
    said = _together(server, 2, runs, folder, cache)
    assert said.count("\npage: ") == len(runs)  # one of the two speaks
    return {where: folder / where for where in ("one", "two", "again")}


def test_gradients_are_summed_once_a_step(trained):
    """Also where a batch runs in several parts. One bucket holds all of these small gradients."""
    sums = dict(zip(RUNS, json.loads((trained["two"].parent / "runs-2.sums").read_text()), strict=False))
    for name in ("append", "look", "adapters", "8 bit"):
        log = [json.loads(line) for line in (trained["two"] / name / "metrics.jsonl").open()]
        last = {(event["stage"], event["epoch"]): event["step"] for event in log if event["event"] == "steps"}
        assert sums[name] == sum(last.values()) > 0
    assert sums["sharded"] == 0  # FSDP has its own


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(trained, name):
    one, two = read_results(trained["one"] / name), read_results(trained["two"] / name)
    assert len(one.stages) == RUNS[name]["num_stages"]
    assert one.stages[0].accepted
    for ours, theirs in zip(one.stages, two.stages, strict=True):
        assert ours.threshold == pytest.approx(theirs.threshold, rel=1e-6)
        assert (ours.train_hard, ours.val_hard, ours.accepted) == (theirs.train_hard, theirs.val_hard, theirs.accepted)
        for mine, other in zip(ours.epochs, theirs.epochs, strict=True):
            assert mine.train_loss == pytest.approx(other.train_loss, rel=1e-6)
            assert mine.val_loss == pytest.approx(other.val_loss, rel=1e-6)
    assert one.stages[0].threshold == two.stages[0].threshold  # of the base's scores: the same bits
    assert one.final.all_token_test_ppl == pytest.approx(two.final.all_token_test_ppl, rel=1e-6)
    shares = read_results(trained["one"] / name).final.exit_share
    assert shares == pytest.approx(two.final.exit_share, abs=2e-3)


def test_two_processes_are_the_same_each_time(trained):
    of_two, again = (load_tensors(trained[w] / "look/stages/1/model.safetensors")[0] for w in ("two", "again"))
    assert of_two.keys() == again.keys()
    assert all((of_two[name] == again[name]).all() for name in of_two)


def test_what_is_written_is_written_once(trained):
    for name in RUNS:
        one, two = trained["one"] / name, trained["two"] / name
        files = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (one, two)]
        assert files[0] == files[1]
        events = [[json.loads(line)["event"] for line in (f / "metrics.jsonl").open()] for f in (one, two)]
        assert events[0] == events[1]


def test_resumed_by_another_number_of_processes(server, tiny_settings, tmp_path, cache, monkeypatch):
    """Two are interrupted, by a signal to one of them; one and three go on, the three with a stage spread over them."""
    import shutil

    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    settings = {**tiny_settings, **SMALL, "num_stages": 1, "resume": "auto"}
    torch.set_num_threads(1)
    run_cascade(make_settings({**settings, "out": str(tmp_path / "whole")}))
    _together(server, 2, [{**settings, "out": str(tmp_path / "stopped"), "stop_at": 5}], tmp_path, cache)
    assert not (tmp_path / "stopped" / "results.json").exists()
    shutil.copytree(tmp_path / "stopped", tmp_path / "three")
    run_cascade(make_settings({**settings, "out": str(tmp_path / "stopped")}))
    spread = {**settings, "shard": "fsdp", "out": str(tmp_path / "three")}
    _together(server, 3, [spread, {**spread, "out": str(tmp_path / "spread"), "stop_at": 5}], tmp_path, cache)
    run_cascade(make_settings({**settings, "out": str(tmp_path / "spread")}))
    whole = read_results(tmp_path / "whole").stages[0].epochs[0]
    for name in ("stopped", "three", "spread"):
        (found,) = read_results(tmp_path / name).stages[0].epochs
        assert found.train_loss == pytest.approx(whole.train_loss, rel=1e-6)
        assert found.val_loss == pytest.approx(whole.val_loss, rel=1e-6)
        resumed = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open() if '"resume"' in line]
        assert [(record["epoch"], record["step"]) for record in resumed] == [(1, 5)]


def test_one_that_is_killed_ends_all(tiny_settings, tmp_path, cache):
    settings = {**tiny_settings, "num_stages": 1, "epochs": 500, "patience": 500, "out": str(tmp_path / "run")}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command, where = [*TORCHRUN, "2", "-m", "cascade_fast.train", *flags], environment(XDG_CACHE_HOME=cache)
    process = subprocess.Popen(command, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and '"epoch"' in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if "error: " in line]
    assert lines == ["error: another process of this run is gone; the same command with --resume auto goes on"]
    # What torchrun itself says of it comes after that.
    assert "Traceback" not in output[: output.index(lines[0])]


def test_a_mistake_is_one_line(server, tiny_base, tmp_path, cache):
    text = ["--base", str(tiny_base), "--seq-len", "32", "--dataset", str(tmp_path / "no.jsonl")]
    done = together(server, 2, "train", *text, XDG_CACHE_HOME=cache)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: dataset: {str(tmp_path / 'no.jsonl')!r}; no such file or folder"
    ]


def test_a_command_of_one_process_says_so(monkeypatch, capsys):
    from cascade_fast import generate

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert generate.main(["run", "text"]) == 2
    assert "WORLD_SIZE: 2; this command runs in one process: start it without torchrun" in capsys.readouterr().err


def test_what_cannot_be_spread_says_so(tiny_settings, tmp_path):
    with pytest.raises(InputError, match=r"shard: 'fsdp'; several processes are needed: start it with torchrun"):
        run_cascade(make_settings({**tiny_settings, "shard": "fsdp", "out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
    two = Processes(0, 2)
    for wrong in ({"optimizer": "adamw8bit"}, {**LOOK, **ADAPTER}):
        with pytest.raises(InputError, match=r"shard: .fsdp.; (optimizer|adapter)"):
            check_sharding(make_settings({**tiny_settings, "shard": "fsdp", **wrong}), two)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_NTASKS": "8"}, (0, 1, 0)),  # a shell that salloc has opened
    ],
)
def test_the_environment_of_torchrun_and_srun(monkeypatch, given, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert processes_module._environment() == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set; with several processes it names the machine"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'; in the environment, must be a number"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
            "MASTER_ADDR: not set; with several processes it names the machine of the first one",
        ),
    ],
)
def test_processes_that_cannot_find_each_other(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(message)):
        processes_module.start_processes()


def test_parts_of_a_batch():
    """As many for all of them; each unit counts once."""
    import torch

    for units, most, count in itertools.product((1, 2, 6, 7), (1, 2, 3, 10), (1, 2, 3)):
        picked = torch.arange(10, 10 + units)
        shares = [own_parts(picked, most, Processes(rank, count)) for rank in range(count)]
        assert len({len(parts) for parts in shares}) == 1
        counted = [some for parts in shares for some, counts in parts if counts]
        assert torch.equal(torch.cat(counted), picked)
        assert all(1 <= len(some) <= most for parts in shares for some, _ in parts)
    assert [some.tolist() for some, _ in own_parts(torch.arange(7), 4, ALONE)] == [[0, 1, 2, 3], [4, 5, 6]]
