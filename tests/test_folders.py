"""Folders and files that cannot be used as they are: one line each, exit code 2, and nothing is touched."""

import errno
import fcntl
import os
import shutil
import subprocess

import pytest
from run_faults import is_one_line, small_run

from cascade_fast.base import base_pass as base_pass_module
from cascade_fast.runtime import files
from cascade_fast.runtime.files import LockHeld, acquire_lock, atomic_write_text, clear_temporaries, save_tensors


def _refused(server, base, tmp_path, **changes) -> str:
    arguments = small_run(base, tmp_path, "append")
    for flag, value in changes.items():
        arguments[arguments.index("--" + flag.replace("_", "-")) + 1] = str(value)
    answer = server.run(tmp_path, *arguments)
    assert is_one_line(answer), answer
    return answer["err"]


def test_names_that_cannot_be(server, tiny_base, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out, reason in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "file", "exists and is not the folder of a run"),
    ):
        said = _refused(server, tiny_base, tmp_path, out=out)
        assert "error: out: " in said
        assert reason in said
    for cache, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "cache", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        said = _refused(server, tiny_base, tmp_path, cache_dir=cache)
        assert "error: cache_dir: " in said
        assert reason in said
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written(server, tiny_base, tmp_path):
    folder = tmp_path / "fixed"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere, and a read-only file system cannot be mounted here")
        folder.chmod(0o555)
    try:
        assert "error: out: " in _refused(server, tiny_base, tmp_path, out=folder / "run")
        assert "error: cache_dir: " in _refused(server, tiny_base, tmp_path, cache_dir=folder)
        assert "error: cache_dir: " in _refused(server, tiny_base, tmp_path, cache_dir=folder / "cache")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_base_that_cannot_be_read(server, tiny_base, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / name).unlink()
    (base / name).mkdir()  # even root cannot read a folder as a file
    assert "base: " in _refused(server, base, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_a_link(server, tiny_base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "elsewhere")
    assert "its run.lock is a link, which is no lock: remove it" in _refused(server, tiny_base, tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "mine"


# --- file systems without flock ---------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP])
def without_flock(request, monkeypatch):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_is_the_lock_then(without_flock, tmp_path):
    lock = acquire_lock(tmp_path / "run.lock", timeout=0)
    with pytest.raises(LockHeld, match=rf"\({os.getpid()} .*\); if that process is gone, remove"):
        acquire_lock(tmp_path / "run.lock", timeout=0)
    lock.release()
    acquire_lock(tmp_path / "run.lock", timeout=0).release()


def test_a_lock_left_by_a_host_that_is_gone_is_named(server, tiny_base, tmp_path):
    """In a process of its own: whether there is flock is asked once."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("4711\nlost-host\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import errno, fcntl, os, sys\n"
        "def refuse(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        "fcntl.flock = refuse\n"
        "from cascade_fast import train\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    arguments = small_run(tiny_base, tmp_path, "append")[1:]
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    refused = server.run(None, script, *arguments)
    assert is_one_line(refused), refused
    line = refused["err"]
    assert "another process is training there (4711 lost-host)" in line
    assert f"if that process is gone, remove '{tmp_path / 'run' / 'run.lock'}'" in line
    (tmp_path / "run" / "run.lock").unlink()
    done = server.run(None, script, *arguments)
    assert (done["code"], done["err"]) == (0, ""), done


# --- what is left and what is made ------------------------------------------------------------------------------------


def test_what_killed_processes_left_is_cleared(tmp_path):
    left = [".x.json.123.tmp", ".tmpAb3dE1", "a/.y.safetensors.9.tmp"]
    kept = [".hidden", "x.tmp", ".x.tmp", "a/.tmp"]
    (tmp_path / "a").mkdir()
    for name in (*left, *kept):
        (tmp_path / name).write_text("")
    clear_temporaries(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_every_file_has_the_mode_of_the_umask(tmp_path):
    import torch

    (tmp_path / "plain").write_text("")
    atomic_write_text(tmp_path / "text", "x")
    save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3)})
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert set(modes.values()) == {modes["plain"]}, modes


def test_pruning_leaves_a_pass_that_somebody_is_at(tmp_path, monkeypatch):
    monkeypatch.setattr(base_pass_module, "KEEP_PASSES", 1)
    for number, name in enumerate(("used", "old", "new")):
        folder = tmp_path / "base-pass" / name
        folder.mkdir(parents=True)
        (folder / base_pass_module.RECORD).write_text("{}")
        os.utime(folder, (number, number))
    with files.locked(tmp_path / "locks" / "used.lock"):
        base_pass_module._prune(tmp_path, keep="new")
    assert sorted(p.name for p in (tmp_path / "base-pass").iterdir()) == ["new", "used"]
    base_pass_module._prune(tmp_path, keep="new")
    assert [p.name for p in (tmp_path / "base-pass").iterdir()] == ["new"]
