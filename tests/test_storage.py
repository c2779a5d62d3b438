"""Hidden stores and checkpoints: whole or noticed."""

import pytest
import torch

from cascade_fast.base.hidden_store import HiddenStore, StoreError
from cascade_fast.runtime.checkpoint import Checkpoints
from cascade_fast.runtime.files import atomic_write, read_json, write_json


def _store(folder, tokens=10, dtype=torch.bfloat16, with_loss=True):
    store = HiddenStore.create(folder, tokens, 4, dtype, with_loss=with_loss, meta={"fingerprint": "abc"})
    hidden = torch.arange(tokens * 4).view(tokens, 4).to(dtype)
    rows = {"hidden": hidden, "label": torch.arange(tokens), "score": torch.linspace(-1, 1, tokens)}
    for some in torch.arange(tokens).split(4):  # in several parts, the last one shorter
        store.append({name: array[some] for name, array in rows.items()})
    return store


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_store_comes_back_as_written(tmp_path, dtype):
    finished = _store(tmp_path / "s", dtype=dtype).finish()
    read = HiddenStore.open(tmp_path / "s", fingerprint="abc")
    assert len(read) == 10
    for name, array in finished.arrays.items():
        assert torch.equal(read[name], array)
        assert read[name].dtype == array.dtype
    assert read.bytes() == 10 * (4 * dtype.itemsize + 8 + 4 + 4 + 4 + 4)


def test_an_empty_store_and_one_without_losses(tmp_path):
    read = _store(tmp_path / "s", tokens=0, with_loss=False).finish()
    assert len(HiddenStore.open(tmp_path / "s")) == len(read) == 0
    assert "loss" not in read
    assert "score" in read


def test_writing_to_an_open_store_does_not_reach_the_file(tmp_path):
    _store(tmp_path / "s").finish()["label"][:] = 99
    assert HiddenStore.open(tmp_path / "s")["label"].tolist() == list(range(10))


def test_what_is_not_a_whole_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no hidden store"):
        HiddenStore.open(tmp_path / "absent")
    store = _store(tmp_path / "s")
    with pytest.raises(StoreError, match="not finished"):
        HiddenStore.open(tmp_path / "s")
    store.save_progress()
    assert torch.equal(HiddenStore.resume(tmp_path / "s", fingerprint="abc")["label"], store["label"])
    store.finish()
    with pytest.raises(StoreError, match="something else"):
        HiddenStore.open(tmp_path / "s", fingerprint="other")
    path = tmp_path / "s" / "score.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        HiddenStore.open(tmp_path / "s")
    path.write_bytes(content[:-1])
    with pytest.raises(StoreError, match="missing or of another size"):
        HiddenStore.open(tmp_path / "s")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fails)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def _saved(folder, steps=(1, 2, 3)):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(
            step, {"w": torch.full((3,), float(step)), "e": torch.empty(0), "s": torch.tensor(step)}, {"step": step}
        )
    return checkpoints


def test_the_last_two_checkpoints_are_kept_and_the_newest_read(tmp_path):
    checkpoints = _saved(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    tensors, state = checkpoints.load()
    assert state == {"step": 3}
    assert tensors["w"].tolist() == [3.0] * 3
    assert tensors["s"].item() == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, damage, capsys):
    checkpoints = _saved(tmp_path)
    newest = sorted(tmp_path.iterdir())[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[-2] ^= 1  # inside a tensor: safetensors itself would not notice
    newest.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    tensors, state = checkpoints.load()
    assert "is damaged" in capsys.readouterr().out
    assert state == {"step": 2}
    assert tensors["w"].tolist() == [2.0] * 3


def test_nothing_whole_means_nothing(tmp_path, capsys):
    assert Checkpoints(tmp_path / "absent").load() is None
    checkpoints = _saved(tmp_path, steps=(1,))
    next(tmp_path.iterdir()).write_bytes(b"x" * 100)
    assert checkpoints.load() is None
    assert "is damaged" in capsys.readouterr().out
