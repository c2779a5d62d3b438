"""The trainer's step: parts of a batch, float16 steps left out, nothing that waits for the device."""

import json

import pytest
import torch
from conftest import tiny_llama_config
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.settings import make_settings
from cascade_fast.stages.append import AppendedStage
from cascade_fast.stages.stage import StageConfig
from cascade_fast.stages.tokens import StageTokens
from cascade_fast.training import trainer as training
from cascade_fast.training.optimizers import learning_rate
from cascade_fast.training.scaler import FoldingScaler
from cascade_fast.training.stage_trainer import StageTrainer

TOKENS = 96


def _trainer(folder, *, dtype=torch.float32, head_scale=0.3, **settings) -> StageTrainer:
    folder.mkdir()
    base = tiny_llama_config()
    settings = make_settings({"layers_per_stage": 2, "batch_tokens": 32, "epochs": 1, "lr": 1e-3, **settings})
    generator = torch.Generator().manual_seed(0)
    store = HiddenStore.create(
        folder / "store", TOKENS, base.hidden_size, torch.float32, with_loss=True, meta={"reads": settings.reads}
    )
    hidden = torch.randn(TOKENS, base.hidden_size, generator=generator)
    store.append({"hidden": hidden, "label": torch.randint(0, base.vocab_size, (TOKENS,), generator=generator)})
    tokens = StageTokens(store.finish(), torch.arange(TOKENS))
    shape = StageConfig.from_base(base, layers=2, init=settings.init, head=settings.head, reads=settings.reads)
    head_VD = torch.randn(base.vocab_size, base.hidden_size, generator=generator) * head_scale
    stage = AppendedStage(shape, head_VD=head_VD if settings.head == "shared" else None, seed=1)
    return StageTrainer(
        stage, tokens, tokens, settings, number=1, folder=folder, compute=Compute(torch.device("cpu"), dtype),
        log=MetricsLog(folder / "log.jsonl"), log_size=0,
    )  # fmt: skip


def _events(trainer, name):
    lines = trainer.log.path.read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize("parts", [1, 7, 16])
@pytest.mark.parametrize("preset", ["warm", "seed"])
def test_a_batch_in_parts_is_the_batch(tmp_path, preset, parts):
    whole = _trainer(tmp_path / "whole", preset=preset, dtype=torch.float32, patience=1, hard_ratio=0.6)
    split = _trainer(tmp_path / "split", preset=preset, dtype=torch.float32, micro_batch_tokens=parts)
    for trainer in (whole, split):
        for picked in torch.arange(TOKENS).split(32):
            trainer.train_step(picked)
            trainer.step += 1
    torch.testing.assert_close(split.totals, whole.totals, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(whole.module.named_parameters(), split.module.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("folds", [False, True], ids=["as on the CPU", "as on a GPU"])
def test_a_float16_step_that_overflows_is_left_out_and_counted(tmp_path, folds, optimizer):
    trainer = _trainer(tmp_path / "run", dtype=torch.float16, head_scale=0.3, optimizer=optimizer)
    trainer.folds = folds
    trainer.scaler = FoldingScaler("cpu", init_scale=2.0**40)  # overflows float16's range at first
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.train_step(torch.arange(32))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer.totals.tolist() == [0.0, 0.0, 1.0]
    assert trainer.scaler.get_scale() == 2.0**39
    for _ in range(40):
        trainer.train_step(torch.arange(32))
        trainer.step += 1
    skipped = trainer.totals[2].item()
    assert 1 < skipped < 40
    assert trainer.totals[1].item() == (41 - skipped) * 32
    counts = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
    assert counts == {41 - skipped}
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer._look()
    (line,) = _events(trainer, "steps")
    assert line["skipped_steps"] == skipped
    assert 0 < line["loss"] < 20


def test_nothing_but_overflowing_steps_is_divergence(tmp_path):
    trainer = _trainer(tmp_path / "run", dtype=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=0.99)
    trainer.train_step(torch.arange(32))
    trainer.step += 1
    assert not trainer._look()
    assert trainer.history.stopped == "non-finite loss"
    assert _events(trainer, "non_finite_loss")


def test_the_scale_and_the_totals_survive_a_resume(tmp_path):
    trainer = _trainer(tmp_path / "run", dtype=torch.float16)
    for _ in range(2):
        trainer.train_step(torch.arange(32))
        trainer.step += 1
    trainer.scaler.update(512.0)
    trainer.save_checkpoint()
    trainer.writer.wait()
    again = _trainer(tmp_path / "other", dtype=torch.float16)
    again.checkpoints = trainer.checkpoints
    again._resume()
    assert again.scaler.get_scale() == 512.0
    assert torch.equal(again.totals, trainer.totals)
    assert again.last_look == trainer.last_look


class _Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values read back, sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_to_cpu")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.NAMES):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["warm", "seed"])
@pytest.mark.parametrize("micro", [None, 8])
def test_a_step_waits_for_nothing(tmp_path, preset, micro):
    trainer = _trainer(tmp_path / "run", preset=preset, micro_batch_tokens=micro)
    trainer.train_step(torch.arange(32))  # the optimizer makes its state
    trainer.step += 1
    with _Waits() as waits:
        for _ in range(3):
            trainer.train_step(torch.arange(32))
            trainer.step += 1
    assert waits.found == []
    with _Waits() as waits:  # the check can fail
        torch.ones(1).item()
    assert waits.found


@pytest.mark.parametrize(("end", "seconds", "waits"), [("epoch", 3.75, 1), ("checkpoint", 3.75, 4), ("signal", 2.5, 1)])
def test_the_clock_is_read_when_the_device_is_done(tmp_path, monkeypatch, end, seconds, waits):
    """A step takes a quarter of a second to hand over and then a second to do: it counts once somebody has waited."""
    trainer = _trainer(tmp_path / "run", checkpoint_minutes=1e-3 if end == "checkpoint" else 10)
    clock, queued, waited = 100.0, 0, 0
    real_step = trainer.train_step

    def step(picked):
        nonlocal clock, queued
        clock, queued = clock + 0.25, queued + 1
        if end == "signal" and queued == 2:
            trainer.signals = [2]
        return real_step(picked)

    def wait(device):
        nonlocal clock, queued, waited
        clock, queued, waited = clock + queued, 0, waited + 1

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(training, "wait_for", wait)
    monkeypatch.setattr(training.time, "monotonic", lambda: clock)
    if end == "signal":
        with pytest.raises(training.Interrupted):
            trainer.run_epochs()
    else:
        trainer.run_epochs()
        assert trainer.history.epochs[0].seconds == seconds
    if end != "epoch":  # during which nothing was saved
        assert trainer.checkpoints.load()[1]["epoch_seconds"] == seconds
    assert waited == waits


def test_the_rate_that_is_logged_is_that_of_the_last_step(tmp_path):
    """Also after a resume at the end of an epoch, when no step has set the optimizer's since."""
    trainer = _trainer(tmp_path / "run", lr=1e-3, warmup_steps=0, epochs=2)
    trainer.step, trainer.totals[0], trainer.totals[1] = trainer.steps_per_epoch, 3.0, 96
    assert trainer._look()
    (line,) = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    steps = trainer.steps_per_epoch
    assert line["lr"] == learning_rate(trainer.settings, steps - 1, 2 * steps) < 1e-3
