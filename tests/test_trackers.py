"""Trackers follow a run: what they are told, that a resumed run goes on in them, and that none can end a run."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from cascade_fast.cascade import run_cascade
from cascade_fast.input_checks import InputError
from cascade_fast.runtime import trackers
from cascade_fast.settings import make_settings
from cascade_fast.training import trainer

EPOCH_STEPS = 12  # 768 hard tokens, 64 in a step


@pytest.fixture
def settings(tiny_settings, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_STEPS", 4)
    return {**tiny_settings, "accept": "always", "hard_ratio": 0.6, "num_stages": 1}


def _run(settings, folder, *report_to, **changes):
    return run_cascade(make_settings({**settings, **changes, "out": str(folder), "report_to": list(report_to)}))


def _records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _interrupt_at(monkeypatch, step: int):
    """In this step of the run's training, without a checkpoint for it, as a kill would."""
    real, done = trainer.Trainer.train_step, []

    def step_or_stop(self, picked):
        done.append(1)
        if len(done) == step:
            raise KeyboardInterrupt
        return real(self, picked)

    monkeypatch.setattr(trainer.Trainer, "train_step", step_or_stop)


def _interrupt(settings, folder, *report_to, step, **changes):
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            _run(settings, folder, *report_to, **changes)


def _curves(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _expected(folder) -> dict[str, list[tuple[int, float]]]:
    """The losses and perplexities that metrics.jsonl has, at the steps they belong to."""
    curves: dict[str, list[tuple[int, float]]] = {}
    before = step = 0
    for record in _records(folder):
        name = f"stage_{record.get('stage')}"
        if record["event"] == "steps":
            step = before + record["step"]
            curves.setdefault(f"{name}/loss", []).append((step, record["loss"]))
            curves.setdefault(f"{name}/lr", []).append((step, record["lr"]))
        if record["event"] == "epoch":
            before = step
            curves.setdefault(f"{name}/val_ppl", []).append((step, record["val_ppl"]))
        if record["event"] == "stage":
            curves[f"{name}/threshold"] = [(step, record["threshold"])]
            curves[f"{name}/exit_share/base"] = [(step, record["exit_share"]["base"])]
        if record["event"] == "end":
            curves["results/all_token_val_ppl"] = [(step, record["all_token_val_ppl"])]
    return curves


def _assert_told(found, expected):
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-5), name


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_curves_and_the_run_its_bits(settings, tmp_path):
    _run(settings, tmp_path / "plain", num_stages=2)
    _run(settings, tmp_path / "run", "tensorboard", num_stages=2)
    found = _curves(tmp_path / "run")
    _assert_told(found, _expected(tmp_path / "run"))
    assert [step for step, _ in found["stage_1/loss"]] == [4, 8, 12, 16, 20, 24]
    assert found["stage_2/loss"][0][0] == 2 * EPOCH_STEPS + 4  # goes on where stage 1 ended
    for name in ("tokens_per_second", "peak_memory_bytes", "train_loss", "val_loss", "all_token_val_ppl"):
        assert all(value > 0 for _, value in found[f"stage_1/{name}"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["results/base_val_ppl"][0][1] == pytest.approx(results["base"]["val_ppl"], rel=1e-5)
    (hyper_parameters,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert "layers_per_stage: 2" in hyper_parameters.read_text()
    for number in (1, 2):
        weights = [load_file(tmp_path / name / f"stages/{number}/model.safetensors") for name in ("plain", "run")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("step", [EPOCH_STEPS + 7, 2 * EPOCH_STEPS + 3])
def test_a_resumed_run_goes_on_in_tensorboard_and_tells_nothing_twice(settings, tmp_path, step):
    folder = tmp_path / "run"
    _interrupt(settings, folder, "tensorboard", step=step, num_stages=2)
    assert _curves(folder)["stage_1/loss"][-1][0] == min(step // 4 * 4, 2 * EPOCH_STEPS)
    _run(settings, folder, "tensorboard", resume="auto", num_stages=2)
    _assert_told(_curves(folder), _expected(folder))
    assert len(list((folder / "tensorboard").glob("*/hparams.yml"))) == 1


def test_a_tracker_that_comes_later_is_told_what_was_before(settings, tmp_path):
    folder = tmp_path / "run"
    _interrupt(settings, folder, step=EPOCH_STEPS + 7)
    assert not (folder / "trackers.json").exists()
    _run(settings, folder, "tensorboard", resume="auto")
    _assert_told(_curves(folder), _expected(folder))


def test_none_is_none(settings, tmp_path):
    _run(settings, tmp_path / "run", "none")
    assert not any((tmp_path / "run").glob("t*"))


# --- the others, by a module that stands for theirs -------------------------------------------------------------------


class Fake(types.ModuleType):
    """Of the API of wandb and trackio that accelerate uses."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
        self.fails_at = fails_at
        self.started: list[dict] = []
        self.told: list[tuple[int, dict]] = []
        self.finished = 0
        self.hyper_parameters: dict = {}
        self.config = types.SimpleNamespace(update=lambda values, **_: self.hyper_parameters.update(values))

    def init(self, **options):
        if self.fails_at == 0:
            raise OSError("no network")
        self.started.append(options)
        return self

    def log(self, values, step=None):
        if self.fails_at is not None and len(self.told) >= self.fails_at:
            raise RuntimeError("no network\nat all")
        self.told.append((step, values))

    def finish(self):
        self.finished += 1


def _fake(monkeypatch, name, fails_at=None) -> Fake:
    module = Fake(name, fails_at)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run(settings, tmp_path, monkeypatch, name):
    fake, folder = _fake(monkeypatch, name), tmp_path / "run"
    _interrupt(settings, folder, name, step=EPOCH_STEPS + 7)
    _run(settings, folder, name, resume="auto")
    first, second = fake.started
    assert first == second
    assert first["project"] == "cascade_fast"
    assert first["resume"] == "allow"
    assert first["name"].startswith("run-")
    if name == "wandb":
        assert first["id"] == json.loads((folder / "trackers.json").read_text())["id"]
        assert first["dir"] == str(folder)
    assert fake.hyper_parameters["hard_ratio"] == 0.6
    assert fake.finished == 2
    steps = [step for step, _ in fake.told]
    assert steps == sorted(steps)  # wandb passes over steps that go back
    found: dict[str, list] = {}
    for step, values in fake.told:
        for key, value in values.items():
            found.setdefault(key, []).append((step, value))
    _assert_told(found, _expected(folder))


def test_another_run_in_a_folder_of_that_name_is_another(settings, tmp_path, monkeypatch):
    fake = _fake(monkeypatch, "trackio")
    for parent in ("a", "b"):
        _run(settings, tmp_path / parent / "run", "trackio", epochs=1)
    assert fake.started[0]["name"] != fake.started[1]["name"]


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(settings, tmp_path, monkeypatch, capsys, fails_at):
    fake = _fake(monkeypatch, "wandb", fails_at)
    _run(settings, tmp_path / "run", "wandb", "tensorboard")
    lines = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    said = "no network" if fails_at == 0 else "no network at all"
    assert lines == [f"note: report_to: wandb failed and is left out from here on: {said}"]
    assert len(fake.told) == fails_at
    assert fake.finished == 0
    _assert_told(_curves(tmp_path / "run"), _expected(tmp_path / "run"))


def test_a_tracker_that_did_not_start_is_told_everything_when_it_does(settings, tmp_path, monkeypatch):
    fake, folder = _fake(monkeypatch, "wandb", fails_at=0), tmp_path / "run"
    _interrupt(settings, folder, "wandb", step=EPOCH_STEPS + 7)
    fake.fails_at = None
    _run(settings, folder, "wandb", resume="auto")
    losses = [step for step, values in fake.told if "stage_1/loss" in values]
    assert losses == [4, 8, 12, 16, 20, 24]


def test_a_record_of_trackers_that_is_damaged_is_a_line(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    _interrupt(settings, folder, "tensorboard", step=EPOCH_STEPS + 7)
    (folder / "trackers.json").write_text("{")
    _run(settings, folder, "tensorboard", resume="auto")
    assert "trackers.json' is damaged" in capsys.readouterr().out


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"accelerate"}, "report_to: 'wandb'; needs wandb: pip install wandb"),
        (set(), "report_to: 'wandb'; needs accelerate and wandb: pip install accelerate wandb"),
    ],
)
def test_a_tracker_that_is_not_installed(settings, tmp_path, monkeypatch, there, said):
    monkeypatch.setattr(trackers, "_installed", lambda package: package in there)
    with pytest.raises(InputError) as raised:
        _run(settings, tmp_path / "run", "wandb")
    assert str(raised.value) == said
    assert not (tmp_path / "run").exists()


def test_an_accelerate_from_before_the_tracker(settings, tmp_path, monkeypatch):
    from accelerate import tracking

    _fake(monkeypatch, "trackio")
    monkeypatch.delitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio")
    with pytest.raises(InputError, match="report_to: 'trackio'; needs a newer accelerate"):
        _run(settings, tmp_path / "run", "trackio")


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder ``wandb`` where it runs."""
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._installed("some_tracker")
