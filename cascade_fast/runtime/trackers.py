"""Trackers that show a run while it trains: TensorBoard, Weights & Biases, trackio, each through accelerate.

They are told what ``metrics.jsonl`` is told. Their step counts the optimizer steps of all stages, one after another,
so that it never goes back.
"""

import importlib.util
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cascade_fast.input_checks import InputError, one_line
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import DamagedFile, read_json, write_json

RECORD = "trackers.json"
PROJECT = "cascade_fast"
# What of a record is told, under these names after ``stage_<n>/``.
FIELDS = {
    "steps": ("loss", "lr", "tokens_per_second", "peak_memory_bytes"),
    "epoch": ("train_loss", "val_loss", "val_ppl"),
    "stage": ("threshold", "exit_threshold", "best_val_ppl", "all_token_val_ppl", "exit_share"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError where accelerate or a tracker's own package is missing. ``names``: ``settings.report_to``."""
    for name in _real(names):
        missing = [package for package in ("accelerate", name) if not _installed(package)]
        if missing:
            raise InputError(f"report_to: {name!r}; needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"report_to: {name!r}; needs a newer accelerate: pip install --upgrade accelerate")


def _real(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name != "none"]


def _installed(package: str) -> bool:
    """wandb leaves a folder ``wandb`` where it runs, which Python would take for a package without files."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class _Told(NamedTuple):
    step: int
    values: dict[str, Any]


class _Steps:
    """Goes through the records of a run and knows the step of each."""

    def __init__(self) -> None:
        self.step = 0  # of the optimizer, of all stages so far
        self.before = 0  # this epoch
        self.told = 0  # records that trackers are told

    def take(self, record: dict[str, Any]) -> _Told | None:
        """What of the next record is told; None: nothing."""
        if record["event"] == "steps":
            self.step = self.before + record["step"]
        elif record["event"] == "epoch":
            self.before = self.step
        values = _values(record)
        if not values:
            return None
        self.told += 1
        return _Told(self.step, values)


def _values(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers and text by the names they have in trackers."""
    event = record["event"]
    if event == "end":
        return _numbers("results", {name: value for name, value in record.items() if name != "time"})
    if event == "sample":
        lines = [f"**{name}**: {record[name]}" for name in ("prompt", "base", "cascade") if record[name] is not None]
        return {f"stage_{record['stage']}/sample_{record['number']}": "\n\n".join(lines)}
    fields = {name: record[name] for name in FIELDS.get(event, ()) if name in record}
    return _numbers(f"stage_{record['stage']}", fields) if fields else {}


def _numbers(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= _numbers(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}/{name}"] = value
    return found


class Trackers:
    """The trackers of a run under way. One that fails is left out from there on, after a line that says so."""

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}  # accelerate's trackers by name
        self.steps = _Steps()
        self.most_told = 0

    @classmethod
    def start(
        cls, names: Sequence[str], folder: Path, settings: dict[str, Any], records: list[dict[str, Any]]
    ) -> "Trackers":
        """Starts trackers, or goes on with those the run had before.

        Args:
            names: ``settings.report_to``.
            folder: of the run; ``trackers.json`` there says which trackers know of it, and under which id.
            settings: of the run, told as hyper-parameters.
            records: of ``metrics.jsonl`` so far. A tracker that is new to the run is told them now.
        """
        trackers = cls()
        told = [told for record in records if (told := trackers.steps.take(record))]
        trackers.most_told = len(told)
        if not _real(names):
            return trackers
        known = _read(folder / RECORD)
        for name in _real(names):
            trackers._attempt(name, trackers._start, name, folder, known["id"])
            new = name not in known["trackers"]
            if new or name != "tensorboard":  # where accelerate would write one more file of them
                trackers._log(name, "store_init_configuration", _flat(settings))
            for step, values in told if new else ():
                trackers._log(name, "log", values, step=step)
        write_json(folder / RECORD, {**known, "trackers": list(dict.fromkeys([*known["trackers"], *trackers.running]))})
        return trackers

    def _start(self, name: str, folder: Path, id: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's own messages need it
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        title = f"{folder.absolute().name}-{id[:4]}"
        tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
        tracker = {
            "tensorboard": lambda: tracker_class("tensorboard", logging_dir=str(folder)),
            "wandb": lambda: tracker_class(project, name=title, id=id, resume="allow", dir=str(folder)),
            "trackio": lambda: tracker_class(project, name=title, resume="allow"),
        }[name]()
        if hasattr(tracker, "start"):  # before accelerate 1.10 it starts when it is made
            tracker.start()
        self.running[name] = tracker

    def tell(self, record: dict[str, Any]) -> None:
        """A new record of ``metrics.jsonl``."""
        told = self.steps.take(record)
        if told is None or self.steps.told <= self.most_told:  # known from before the run was resumed
            return
        self.most_told = self.steps.told
        for name in list(self.running):
            self._log(name, "log", told.values, step=told.step)

    def go_back(self, records: list[dict[str, Any]]) -> None:
        """To where ``metrics.jsonl`` ends with ``records``. What was told of the steps that are run again stays, and
        is not told again: it is the same."""
        self.steps = _Steps()
        for record in records:
            self.steps.take(record)

    def close(self) -> None:
        for name in list(self.running):
            self._log(name, "finish")
        self.running.clear()

    def _log(self, name: str, method: str, *args: Any, **kwargs: Any) -> None:
        if name in self.running:
            self._attempt(name, getattr(self.running[name], method), *args, **kwargs)

    def _attempt(self, name: str, work: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        try:
            work(*args, **kwargs)
        except Exception as error:  # no network, no account, a full disk: training is worth more
            self.running.pop(name, None)
            say(f"note: report_to: {name} failed and is left out from here on: {one_line(error)}")


def _read(path: Path) -> dict[str, Any]:
    if path.exists():
        try:
            return read_json(path, needs=("id", "trackers"))
        except DamagedFile as error:
            say(f"note: report_to: {error}; trackers begin anew")
    return {"id": uuid.uuid4().hex, "trackers": []}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """As hyper-parameters: values of one kind each, no lists."""
    texts = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()}
    return {name: value for name, value in texts.items() if value is not None}
