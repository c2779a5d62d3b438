"""A disk that fills up, and folders that cannot be used: one line, exit code 2, and what was there stays whole."""

import os
import random
import shutil
import subprocess

import pytest
import torch
from run_faults import differences, epochs_told, is_one_line, small_run

from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.input_checks import InputError
from cascade_fast.planning.disk import check_disk
from cascade_fast.planning.memory import BASE_PASS_DISK
from cascade_fast.runtime import files
from cascade_fast.runtime.files import DiskFull

KINDS = ("append", "second-look")
NO_MOUNT = "a small file system cannot be mounted here (needs root)"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(NO_MOUNT)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill_and_go_on(server, base, disk, tmp_path, kind, points) -> None:
    """A disk that is full from some operation on; with room again the run goes on to the same bits."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    operations = server.run(undisturbed, *small_run(base, undisturbed, kind))["operations"]
    refused = 0
    for point in points:
        folder = disk / str(point)
        folder.mkdir()
        answer = server.run(folder, *small_run(base, folder, kind), fill_at=max(1, int(point * operations)))
        if answer["code"]:
            assert is_one_line(answer), (point, answer)
            # By the plan, where the run's first operations have found it full, or by what could not be written.
            assert "the disk is full: " in answer["err"] or "MiB more on the disk of" in answer["err"], answer
            assert "MiB are free" in answer["err"], answer
            refused += 1
        (folder / "ballast").unlink()
        answer = server.run(folder, *small_run(base, folder, kind))
        assert answer["code"] == 0, (point, answer["err"])
        assert not differences(undisturbed / "run", folder / "run"), point
        assert epochs_told(folder / "run") == epochs_told(undisturbed / "run"), point
        shutil.rmtree(folder)
    assert refused, "the disk was never full"
    shutil.copytree(undisturbed, disk / "finished")
    (disk / "ballast").write_bytes(bytes(int(files.free_disk_bytes(disk)) - 2**16))
    answer = server.run(disk / "finished", *small_run(base, disk / "finished", kind))  # which takes no more room
    assert "finished already" in answer["out"], answer


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up(server, tiny_base, small_disk, tmp_path, kind):
    _fill_and_go_on(server, tiny_base, small_disk, tmp_path, kind, [0.0, 0.05, 0.4, 0.8])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_anywhere(server, tiny_base, small_disk, tmp_path, kind):
    rng = random.Random(3)
    _fill_and_go_on(server, tiny_base, small_disk, tmp_path, kind, [rng.random() for _ in range(40)])


def test_what_is_mapped_is_allocated_first(small_disk):
    """Without that, writing to it would end the process with SIGBUS."""
    with pytest.raises(DiskFull, match=r"needs 46\.\d MiB, \d+\.\d MiB are free there; make room"):
        HiddenStore.create(small_disk / "s", 20_000, 600, torch.float32, with_loss=False, meta={})
    assert not (small_disk / "s").exists()  # what could be allocated has been given back
    assert files.free_disk_bytes(small_disk) > 31 * 2**20


def test_without_posix_fallocate_zeros_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    files.allocate(tmp_path / "x", 3 * 2**20 + 5)
    assert (tmp_path / "x").stat().st_blocks * 512 >= 3 * 2**20 + 5  # no hole
    assert set((tmp_path / "x").read_bytes()) == {0}


def test_the_plan_is_compared_with_what_is_free(tmp_path, monkeypatch):
    planned = {BASE_PASS_DISK: 3.0 * 2**20, "stages": 2.0 * 2**20}
    where = {"out": tmp_path / "run", "base_pass": tmp_path / "cache" / "p"}
    monkeypatch.setattr("cascade_fast.planning.disk.free_disk_bytes", lambda _path: 5.0 * 2**20)
    check_disk(planned, **where)
    monkeypatch.setattr("cascade_fast.planning.disk.free_disk_bytes", lambda _path: 5.0 * 2**20 - 1)
    with pytest.raises(InputError, match=r"needs 5\.0 MiB more on the disk of .*, where 5\.0 MiB are free"):
        check_disk(planned, **where)
    where["base_pass"].mkdir(parents=True)
    (where["base_pass"] / "hidden.bin").write_bytes(bytes(2**20))  # written already
    check_disk(planned, **where)


def test_a_run_that_has_no_room_begins_nothing(server, tiny_base, small_disk, tmp_path):
    (small_disk / "taken").write_bytes(bytes(31 * 2**20 + 2**19))
    arguments = small_run(tiny_base, small_disk, "append")
    arguments[arguments.index("--cache-dir") + 1] = str(tmp_path / "cache")
    answer = server.run(tmp_path, *arguments)
    assert is_one_line(answer), answer
    assert "out, cache_dir: " in answer["err"]
    assert "MiB more on the disk of" in answer["err"]
    assert [p.name for p in small_disk.iterdir()] == ["taken"]
    assert not list((tmp_path / "cache").glob("base-pass"))
