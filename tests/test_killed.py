"""Killed before any file operation, from the very first on: resumed, it is the run nobody disturbed, bit for bit."""

import random
import shutil

import pytest
from run_faults import differences, epochs_told, small_run

KINDS = ("append", "second-look")
FIRST = 20  # operations, each of which a process dies before in the slow tests, and before some of in the others


@pytest.fixture(scope="module")
def undisturbed(server, tiny_base, tmp_path_factory):
    """For each kind of stage: a run's folder, and how many file operations it took."""
    runs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        answer = server.run(folder, *small_run(tiny_base, folder, kind))
        assert answer["code"] == 0, answer["err"]
        runs[kind] = folder / "run", answer["operations"]
    return runs


def _killed(server, base, folder, kind, die_at: int) -> None:
    answer = server.run(folder, *small_run(base, folder, kind), die_at=die_at)
    assert answer["code"] == -9, (die_at, answer)


def _assert_resumes(server, base, folder, kind, undisturbed, die_at) -> None:
    answer = server.run(folder, *small_run(base, folder, kind))
    assert answer["code"] == 0, (die_at, answer["err"])
    assert answer["err"] == "", (die_at, answer["err"])
    assert not differences(undisturbed, folder / "run"), die_at
    assert epochs_told(folder / "run") == epochs_told(undisturbed), die_at
    left = [p.name for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".tmp")]
    assert left == [], (die_at, left)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_the_first_operations(server, tiny_base, undisturbed, tmp_path, kind):
    """With an empty cache, where the first of them are, and one that has the base pass, where the run's own begin."""
    run, _ = undisturbed[kind]
    last = FIRST // 2 if kind == "append" else FIRST // 4
    _kill_and_resume(server, tiny_base, run, tmp_path, kind, range(1, last + 1, 3))
    _kill_and_resume(server, tiny_base, run, tmp_path, kind, range(2, last + 1, 3), cache=run.parent / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random(server, tiny_base, undisturbed, tmp_path, kind):
    run, operations = undisturbed[kind]
    _kill_and_resume(server, tiny_base, run, tmp_path, kind, random.Random(5).sample(range(FIRST, operations), 3))


@pytest.mark.parametrize("file", ["stage-1/.checkpoint-*.tmp", "stage-2/.best-*.tmp"])
def test_killed_within_a_file_of_the_background(server, tiny_base, undisturbed, tmp_path, file):
    """Whatever training does at that moment."""
    answer = server.run(tmp_path, *small_run(tiny_base, tmp_path, "append"), die_when=f"run/training/{file}")
    assert answer["code"] == -9, answer
    assert list(tmp_path.glob(f"run/training/{file}"))
    _assert_resumes(server, tiny_base, tmp_path, "append", undisturbed["append"][0], file)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_several_times_in_one_run(server, tiny_base, undisturbed, tmp_path, kind):
    for die_at in (30, 40, 35, 60, 12):
        answer = server.run(tmp_path, *small_run(tiny_base, tmp_path, kind), die_at=die_at)
        assert answer["code"] in (-9, 0)
    _assert_resumes(server, tiny_base, tmp_path, kind, undisturbed[kind][0], "the last")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_the_first_and_a_hundred_random_operations(server, tiny_base, undisturbed, tmp_path, kind):
    run, operations = undisturbed[kind]
    points = [*range(1, FIRST + 1), *random.Random(6).sample(range(FIRST + 1, operations), 100)]
    _kill_and_resume(server, tiny_base, run, tmp_path, kind, points)
    _kill_and_resume(server, tiny_base, run, tmp_path, kind, range(1, FIRST + 1), cache=run.parent / "cache")


def _kill_and_resume(server, base, run, tmp_path, kind, points, cache=None) -> None:
    for die_at in points:
        folder = tmp_path / str(die_at)
        folder.mkdir()
        if cache is not None:
            shutil.copytree(cache, folder / "cache")
        _killed(server, base, folder, kind, die_at)
        _assert_resumes(server, base, folder, kind, run, die_at)
        shutil.rmtree(folder)
