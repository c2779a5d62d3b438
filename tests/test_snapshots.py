"""Checkpoints in the background: what is written is the moment of the snapshot, errors come back, nothing overtakes."""

import errno
import importlib.util
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from test_stage_trainer import TOKENS, _events, _trainer

from cascade_fast.planning.base_configs import base_configuration
from cascade_fast.planning.counts import Shape
from cascade_fast.planning.memory import GIB, memory_plan
from cascade_fast.runtime import files, snapshots
from cascade_fast.runtime.checkpoint import Checkpoints
from cascade_fast.runtime.files import DiskFull, load_tensors
from cascade_fast.runtime.snapshots import SnapshotWriter
from cascade_fast.settings import make_settings
from cascade_fast.training.optimizers import optimizer_tensors
from cascade_fast.training.trainer import Interrupted

CPU = torch.device("cpu")
STEPS = TOKENS // 32  # of an epoch


class HeldDisk:
    """Instead of safetensors' ``save_file``: of the file ``number`` (from 0) it writes half and waits to be let go."""

    def __init__(self, number: int) -> None:
        self.number, self.files, self.real = number, 0, files.save_file
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __call__(self, tensors, path, metadata) -> None:
        self.real(tensors, path, metadata=metadata)
        if self.files == self.number:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            self.reached.set()
            assert self.let_go.wait(60)
            self.real(tensors, path, metadata=metadata)
        self.files += 1


def _steps(trainer, count: int) -> None:
    for picked in torch.arange(TOKENS).split(32)[:count]:
        trainer.train_step(picked)
        trainer.step += 1


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space left")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch, optimizer):
    trainer = _trainer(tmp_path / "run", optimizer=optimizer)
    disk = HeldDisk(0)
    monkeypatch.setattr(files, "save_file", disk)
    _steps(trainer, 2)
    trainer.log_event("before")
    size = trainer.log.size()
    weights = {name: t.clone() for name, t in trainer.module.state_dict().items()}
    totals = trainer.totals.clone()
    moments = {name: t.clone() for name, t in optimizer_tensors(trainer.optimizer)[0].items()}
    trainer.save_checkpoint()
    _steps(trainer, 1)
    trainer.log_event("after")
    assert trainer.checkpoints.load() is None
    disk.let_go.set()
    trainer.writer.wait()
    assert not torch.equal(totals, trainer.totals)
    again = _trainer(tmp_path / "other", optimizer=optimizer)
    again.checkpoints, again.log = trainer.checkpoints, trainer.log
    again._resume()
    assert again.step == 2
    assert torch.equal(again.totals, totals)
    for name, tensor in again.module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    resumed = optimizer_tensors(again.optimizer)[0]
    assert resumed.keys() == moments.keys() != set()
    for name, tensor in resumed.items():
        assert torch.equal(tensor, moments[name]), name
    assert [e["event"] for e in _events(again, "before")] == ["before"]
    assert _events(again, "after") == []
    assert again.log.size() > size  # "resume" is told after it


@pytest.mark.parametrize("held", [1, 2, 3])  # the checkpoint of epoch 1, the best weights of epoch 2, their checkpoint
def test_killed_while_it_writes_and_training_goes_on(tmp_path, monkeypatch, held):
    """What a kill would leave is copied while the file is half there and the next epoch has been told."""
    settings = {"epochs": 4, "patience": 4, "checkpoint_minutes": 60, "lr": 3e-3}
    undisturbed = _trainer(tmp_path / "undisturbed", **settings)
    undisturbed.run()
    assert undisturbed.history.best_epoch > 2
    trainer = _trainer(tmp_path / "run", **settings)
    disk = HeldDisk(held)
    monkeypatch.setattr(files, "save_file", disk)
    real, epochs = trainer.writer.write, 0

    def write(*args) -> None:  # at the end of each epoch
        nonlocal epochs
        epochs += 1
        if epochs == held // 2 + 2:
            assert disk.reached.wait(60)
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
            disk.let_go.set()
        real(*args)

    monkeypatch.setattr(trainer.writer, "write", write)
    trainer.run()
    monkeypatch.undo()
    told = (tmp_path / "killed" / "log.jsonl").read_text().count('"event": "epoch"')
    whole = len(list((tmp_path / "killed").glob("checkpoint-*")))
    assert list((tmp_path / "killed").glob(".*.tmp"))
    again = _trainer(tmp_path / "again", **settings)
    again.folder, again.checkpoints = tmp_path / "killed", Checkpoints(tmp_path / "killed")
    again.log.path = tmp_path / "killed" / "log.jsonl"
    again.run()
    assert told == whole + 2  # one in the checkpoint that was lost, and one after it
    for one in (trainer, again):
        assert [e["epoch"] for e in _events(one, "epoch")] == [1, 2, 3, 4]
        assert [e.val_loss for e in one.history.epochs] == [e.val_loss for e in undisturbed.history.epochs]
        for name, tensor in one.module.state_dict().items():
            assert torch.equal(tensor, undisturbed.module.state_dict()[name]), name


def test_best_weights_are_written_before_the_checkpoint_that_names_them(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path / "run", epochs=3, lr=3e-3)
    written = []
    real = files.save_file
    monkeypatch.setattr(
        files, "save_file", lambda tensors, path, metadata: (written.append(path.name), real(tensors, path, metadata))
    )
    trainer.run()
    names = [name.split(".")[1] for name in written]
    assert names == ["best-000001", "checkpoint-000000003", "best-000002", "checkpoint-000000006"]
    best, _ = load_tensors(tmp_path / "run" / "best-000002.safetensors")
    checkpoint, state = load_tensors(tmp_path / "run" / "checkpoint-000000006.safetensors")
    assert state["training"]["best_epoch"] == 2
    assert all(torch.equal(tensor, checkpoint[f"stage.{name}"]) for name, tensor in best.items())


@pytest.mark.parametrize(
    ("when", "epochs", "minutes"), [("at the next save", 9, 1e-9), ("at the end", 2, 60), ("at a signal", 2, 60)]
)
def test_a_full_disk_reaches_the_loop(tmp_path, monkeypatch, when, epochs, minutes):
    trainer = _trainer(tmp_path / "run", epochs=epochs, checkpoint_minutes=minutes)
    monkeypatch.setattr(files, "save_file", _full_disk)
    if when == "at a signal":
        trainer.signals = []
        monkeypatch.setattr(trainer, "train_step", lambda _picked: trainer.signals.append(2) or 32)
    with pytest.raises(DiskFull, match=r"the disk is full: .* make room and give the same command again"):
        trainer.run_epochs()
    if when == "at the next save":
        assert trainer.step <= 2
    assert list((tmp_path / "run").glob("*.safetensors")) == list((tmp_path / "run").glob(".*.tmp")) == []


def test_an_interrupted_run_has_written_its_checkpoint(tmp_path, monkeypatch):
    trainer = _trainer(tmp_path / "run", checkpoint_minutes=60)
    real, disk = trainer.train_step, HeldDisk(0)
    monkeypatch.setattr(files, "save_file", disk)
    monkeypatch.setattr(trainer, "train_step", lambda picked: (trainer.signals.append(2), real(picked))[1])
    trainer.signals = []
    timer = threading.Timer(0.2, disk.let_go.set)
    timer.start()
    with pytest.raises(Interrupted):
        trainer.run_epochs()
    assert disk.let_go.is_set()
    assert trainer.checkpoints.load()[1]["step"] == 1


def test_another_error_of_training_does_not_hide_the_writers(tmp_path, capsys):
    writer = SnapshotWriter(CPU)
    writer.write({"x": torch.ones(3)}, _full_disk)
    with pytest.raises(ZeroDivisionError), writer:
        1 / 0  # noqa: B018
    assert "no space left" in capsys.readouterr().out


def test_one_snapshot_at_a_time():
    writer = SnapshotWriter(CPU)
    x = torch.zeros(5)
    let_go, order = threading.Event(), []

    def first(snapshot) -> None:
        order.append("first begins")
        assert let_go.wait(60)
        order.append(f"first ends: {snapshot['x'].sum():.0f}")

    writer.write({"x": x}, first)
    x += 1
    asked = {"x": x}, lambda snapshot: order.append(f"second: {snapshot['x'].sum():.0f}")
    second = threading.Thread(target=writer.write, args=asked)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert order == ["first begins"]
    let_go.set()
    second.join()
    writer.wait()
    assert order == ["first begins", "first ends: 0", "second: 5"]


def test_an_error_is_raised_once_and_nothing_new_is_written_then():
    writer, written = SnapshotWriter(CPU), []
    writer.write({"x": torch.zeros(5)}, _full_disk)
    with pytest.raises(OSError, match="no space left"):
        writer.write({"x": torch.zeros(5)}, written.append)
    assert written == []
    writer.write({"x": torch.zeros(5)}, written.append)
    writer.wait()
    assert len(written) == 1


def test_where_memory_is_short_it_is_written_at_once(monkeypatch):
    """A snapshot takes a quarter of what is free at most; the next one takes the same places, and nothing more."""
    free = 4 * 40 - 1
    monkeypatch.setattr(snapshots, "free_ram_bytes", lambda: free)
    x, seen = torch.arange(10.0), []
    with SnapshotWriter(CPU) as writer:
        writer.write({"x": x}, lambda s: seen.append((threading.current_thread(), s["x"].data_ptr())))
        assert seen == [(threading.main_thread(), x.data_ptr())]
        free += 1
        for _ in range(2):
            writer.write({"x": x}, lambda s: seen.append((threading.current_thread(), s["x"].data_ptr())))
            writer.wait()
            free = 0
    assert threading.main_thread() not in (seen[1][0], seen[2][0])
    assert seen[1][1] == seen[2][1] != x.data_ptr()


def test_a_snapshot_is_planned_where_it_takes_a_quarter_of_what_is_free():
    base = base_configuration("smollm2-135m")

    def training(memory, epochs=2, on_cpu=True):
        settings = make_settings({"epochs": epochs})
        plan = memory_plan(settings, base, dtype=torch.float32, on_cpu=on_cpu, memory_bytes=memory, process_bytes=100)
        return plan.phases[1]

    without, size = (
        training(64 * GIB, epochs=1).needed,
        12 * Shape.from_settings(make_settings({}), base).counts.parameters(),
    )
    enough = without + 4 * size
    assert training(enough).lasting["snapshot for a checkpoint"] == size
    assert training(enough).needed == without + size
    for other in (training(enough - 1), training(without / 2), training(enough, epochs=1)):
        assert "snapshot for a checkpoint" not in other.lasting
    assert "snapshot for a checkpoint" not in training(64 * GIB, on_cpu=False).lasting  # it is in the host's memory


SCRIPT = """
import sys
import torch
from cascade_fast.runtime.files import load_tensors, save_tensors
from cascade_fast.runtime.snapshots import SnapshotWriter
device = torch.device("cuda", 0)
tensors = {
    "w": torch.randn(300, 200, device=device),
    "turned": torch.randn(64, 32, device=device).t(),
    "codes": torch.randint(0, 255, (999,), device=device, dtype=torch.uint8),
    "on the host": torch.arange(3.0),
}
pinned = []
def write(snapshot):
    pinned.append([name for name, t in snapshot.items() if t.is_pinned()])
    save_tensors(sys.argv[1], snapshot, {"turn": 1})
import pathlib
sys.argv[1] = pathlib.Path(sys.argv[1])
with SnapshotWriter(device) as writer:
    for _ in range(2):
        expected = {name: t.cpu().clone() for name, t in tensors.items()}
        writer.write(tensors, write)
        for t in tensors.values():
            t.mul_(2)
found, _ = load_tensors(sys.argv[1])
assert found.keys() == expected.keys()
for name in found:
    assert torch.equal(found[name], expected[name]), name
assert pinned == [list(tensors)] * 2, pinned
"""


@pytest.mark.parametrize(
    "card", [pytest.param("card", marks=pytest.mark.gpu), pytest.param("pretend card", marks=pytest.mark.emulated)]
)
def test_a_snapshot_of_what_is_on_a_gpu(tmp_path, card):
    """On a pretend card copies arrive when somebody has waited for them; till then there is rubbish."""
    command = [sys.executable]
    if card == "pretend card":
        if importlib.util.find_spec("pretend_gpu") is None:
            pytest.skip("the package pretend_gpu is not on the path")
        command += ["-m", "pretend_gpu", "--card", "t4", "--poison", "--late-copies"]
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "x.safetensors")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
