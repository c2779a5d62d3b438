"""Any file of a run or its cache damaged: the same result all the same, or one line that says what is wrong."""

import functools
import json
import random
import shutil
from pathlib import Path

import pytest
from run_faults import differences, is_one_line, small_run

KINDS = ("append", "second-look")
HARMLESS = {"run.lock"}  # nobody reads them
OPTIONAL = {"heat_map.json", "samples.json"}  # runs from before have none
SHOWN = {"report.md", "report.html", "loss.png", "threshold.png", "perplexity.png", "metrics.jsonl"}  # and made again


@pytest.fixture(scope="module")
def runs(server, tiny_base, tmp_path_factory):
    """For each kind of stage: folders of a finished run, and of one that was killed in stage 2, with their caches."""
    found = {}
    for kind in KINDS:
        finished, killed = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("killed")
        answer = server.run(finished, *small_run(tiny_base, finished, kind))
        assert answer["code"] == 0, answer["err"]
        # In the second epoch of stage 2: the first is the best so far.
        second = "run/training/stage-2/checkpoint-000000004*"
        answer = server.run(killed, *small_run(tiny_base, killed, kind), die_when=second)
        assert answer["code"] == -9
        for name in ("training/stage-1/result.json", "hidden/stage-1/train/index.json", "training/stage-2/best-*"):
            assert list(killed.glob(f"run/{name}")), name
        found[kind] = finished, killed
    return found


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "other":
        path.write_bytes(rng.choice([b"{}", b"[]", b"3", b"", b"\x00" * len(content)]))


def files_of(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in HARMLESS)


def _check_resume(server, base, runs, kind, tmp_path, name: Path, how: str, rng) -> None:
    finished, killed = runs[kind]
    folder = tmp_path / "copy"
    shutil.copytree(killed, folder)
    damage(folder / name, how, rng)
    answer = server.run(folder, *small_run(base, folder, kind))
    what = name, how, answer["code"], answer["err"], answer["out"]
    if answer["code"] == 0:
        assert answer["err"] == "", what
        assert not differences(finished / "run", folder / "run"), what
    else:
        assert is_one_line(answer), what
    shutil.rmtree(folder)


def _readings(server, folder: Path) -> list[dict]:
    run = folder / "run"
    table = folder / "table.json"
    answers = [
        server.run(folder, "evaluate", run, "--no-flops", "--json", table),
        server.run(folder, "generate", run, "The class", "--max-new-tokens", "8", "--temperature", "0"),
        server.run(folder, "report", run),
    ]
    for answer, command in zip(answers, ("evaluate", "generate", "report"), strict=True):
        answer["argv"] = command
    if answers[0]["code"] == 0:
        rows = json.loads(table.read_text())["rows"]
        answers[0]["said"] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    answers[1]["said"] = answers[1]["out"]
    if answers[2]["code"] == 0:
        answers[2]["said"] = (run / "report.md").read_text()
    return answers


def _check_readings(server, base, runs, kind, tmp_path, name: Path, how: str, rng, undamaged) -> None:
    finished, _ = runs[kind]
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    damage(folder / name, how, rng)
    for answer, good in zip(_readings(server, folder), undamaged, strict=True):
        what = name, how, answer
        if answer["code"] == 0:
            absent = (
                how == "deleted" and name.name in OPTIONAL and answer["argv"] == "report"
            )  # the report does without
            assert absent or answer["said"] == good["said"], what
        else:
            assert is_one_line(answer), what
    if name.name not in SHOWN:
        answer = server.run(folder, *small_run(base, folder, kind))
        assert answer["code"] == 0 or is_one_line(answer), (name, how, answer)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undamaged(server, runs, tmp_path_factory):
    """What is read of the finished run of a kind of stage."""

    @functools.cache
    def readings(kind: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("undamaged") / "copy"
        shutil.copytree(runs[kind][0], folder)
        answers = _readings(server, folder)
        assert [a["code"] for a in answers] == [0, 0, 0], answers
        return answers

    return readings


NAMES = [
    "run/config.json",
    "run/metrics.jsonl",
    "run/stages/1/model.safetensors",
    "run/training/stage-1/result.json",
    "run/hidden/stage-1/train/index.json",
    "cache/base-pass/*/head.safetensors",
    "cache/base-pass/*/base_pass.json",
    "cache/base-pass/*/train/index.json",
    "run/training/stage-2/best-*.safetensors",
]
HOWS = ["deleted", "cut", "flipped"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOWS)
def test_resumed_with_a_damaged_file(server, tiny_base, runs, tmp_path, name, how):
    """The kinds of stages take turns; the slow test has both."""
    having = [kind for kind in KINDS if any(runs[kind][1].glob(name))]
    kind = having[(NAMES.index(name) + HOWS.index(how)) % len(having)]
    path = max(runs[kind][1].glob(name)).relative_to(runs[kind][1])
    _check_resume(server, tiny_base, runs, kind, tmp_path, path, how, random.Random(f"{name} {how}"))


@pytest.mark.parametrize("how", ["deleted", "cut", "flipped", "other"])
def test_read_with_a_damaged_file(server, tiny_base, runs, undamaged, tmp_path, how):
    for name in ("config.json", "results.json", "heat_map.json", "stages/1/model.safetensors"):
        arguments = server, tiny_base, runs, "second-look", tmp_path, Path("run") / name, how, random.Random(name)
        _check_readings(*arguments, undamaged("second-look"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_damaged_in_every_way(server, tiny_base, runs, undamaged, tmp_path, kind):
    rng = random.Random(11)
    for name in files_of(runs[kind][1]):
        for how in ("deleted", "cut", "flipped", "flipped", "other"):
            _check_resume(server, tiny_base, runs, kind, tmp_path, name, how, rng)
    for name in files_of(runs[kind][0]):
        if name.parts[0] == "run":
            for how in ("deleted", "cut", "flipped", "flipped", "other"):
                _check_readings(server, tiny_base, runs, kind, tmp_path, name, how, rng, undamaged(kind))
