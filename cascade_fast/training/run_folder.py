"""The folder of a run: what is in it, who may use it, and whether a run in it may go on.

config.json         every setting as used, versions, machine, fingerprints of base and data; once finished, also the
                    cascade as ``AutoModelForCausalLM`` reads it
metrics.jsonl       a record for each epoch and event
stages/1/ ...       config.json, model.safetensors: the stages that are kept
cascade.json        base, stages and thresholds: what loads the cascade
results.json        the numbers; report.md, report.html and *.png show them
heat_map.json       some validation text, token by token; report.html shows it
samples.json        some text as base and cascade write it; made by train after the end, the reports show it
training/, hidden/  checkpoints and hidden states of a run under way; removed when it is finished
"""

import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch

from cascade_fast import __version__
from cascade_fast.base.model import BaseModel
from cascade_fast.criteria import model_criteria
from cascade_fast.input_checks import InputError
from cascade_fast.model.configuration import CascadeConfig
from cascade_fast.planning.plan import RunPlan
from cascade_fast.reporting.heat_map import write_heat_map
from cascade_fast.reporting.report import write_report
from cascade_fast.runtime.compute import Compute
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import (
    DamagedFile,
    LockHeld,
    acquire_lock,
    clear_temporaries,
    is_temporary,
    load_tensors,
    read_json,
    write_json,
)
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.runtime.run_folder import LOCK
from cascade_fast.settings import RESUME_MAY_CHANGE, RunSettings, saved_settings
from cascade_fast.stages.exits import ExitStage

RUNS = Path("runs")
CASCADE_FORMAT = 1


class RunFolder:
    """Locked for one process while open; use as a context manager.

    ``record`` is what ``config.json`` says of the run; ``kv`` in it is what ``kv: auto`` was settled to when it began.
    ``plan`` is that of the run, None where it was finished when it was found.
    """

    def __init__(self, path: Path, record: dict[str, Any] | None = None, plan: RunPlan | None = None) -> None:
        self.path = path
        self.record = record or {}
        self.plan = plan
        self.log = MetricsLog(path / "metrics.jsonl")
        self._lock: filelock.BaseFileLock | None = None

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        base_fingerprint: str,
        data_fingerprint: str,
        *,
        compute: Compute,
        make_plan: Callable[[Path, str | None], RunPlan],
    ) -> "RunFolder":
        """The folder of a new run, or of the one to go on with.

        Args:
            make_plan: called with the folder and what ``kv`` was settled to before, if it was, unless the run is
                finished: that takes no more room. May raise InputError.

        Raises:
            InputError: the folder is something else, holds a run that may not be resumed (and how it differs), cannot
                be written, or is in use by another process. Nothing in it has been touched then.
        """
        path = _choose(settings)
        record: dict[str, Any] = {
            "settings": settings.to_dict(),
            "fingerprints": {"base": base_fingerprint, "data": data_fingerprint},
            "versions": _versions(),
            "machine": _machine(compute),
        }
        try:
            found = _found(path, settings.resume, record)
            kv = found.get("kv") if found else None
            plan = None if found and cls(path).finished else make_plan(path, kv)
            if plan is not None:
                kv = plan.settings.kv
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, {**(found or record), "kv": kv}, plan)
            folder._acquire()
        except OSError as error:
            raise InputError(f"out: {str(path)!r}; cannot be used: {error.strerror or error}") from error
        try:
            folder._start(record, new=found is None, preset=settings.preset)
        except BaseException:
            folder.__exit__()
            raise
        return folder

    def _acquire(self) -> None:
        file = self.path / LOCK
        if file.is_symlink():
            raise InputError(f"out: {str(self.path)!r}; its {LOCK} is a link, which is no lock: remove it")
        try:
            self._lock = acquire_lock(file, timeout=0)
        except LockHeld as held:
            raise InputError(f"out: {str(self.path)!r}; another process is training there{held.hint}") from None

    def _start(self, record: dict[str, Any], *, new: bool, preset: str) -> None:
        """Cleans up after a process that was killed, and begins the records of a new run."""
        clear_temporaries(self.path)
        if new:
            write_json(self.path / "config.json", self.record)
        elif not self.finished:
            _warn_versions(self.record, record)
        if self.log.first_line_size() == 0 and not self.finished:
            if any(self.path.glob("training/*")):
                say(f"note: {self.log.path.name} is missing or damaged; its records so far are lost")
            self.log.truncate(0)
            self.log.write("start", preset=preset)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def finished(self) -> bool:
        return (self.path / "results.json").is_file() and self.report.is_file()

    def check(self) -> None:
        """Of a finished run: raises DamagedFile where a file that holds its result is not whole."""
        results = read_json(self.path / "results.json", needs=("final",))
        for name in ("config.json", "cascade.json"):
            read_json(self.path / name)
        for number in range(1, results["final"]["stages_kept"] + 1):
            load_tensors(self.stage(number) / "model.safetensors")

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def stage(self, number: int) -> Path:
        return self.path / "stages" / str(number)

    def training(self, number: int) -> Path:
        return self.path / "training" / f"stage-{number}"

    def hidden(self, number: int, split: str) -> Path:
        return self.path / "hidden" / f"stage-{number}" / split

    def stage_record(self, number: int) -> dict[str, Any] | None:
        """The record of a stage whose training is over, kept or not. Raises DamagedFile."""
        path = self.training(number) / "result.json"
        return read_json(path, needs=("record", "metrics_size"))["record"] if path.exists() else None

    def write_stage_record(self, number: int, record: dict[str, Any], metrics_size: int) -> None:
        """Marks the stage as done; its checkpoints are no longer needed."""
        write_json(self.training(number) / "result.json", {"record": record, "metrics_size": metrics_size})
        for file in self.training(number).glob("*.safetensors"):
            file.unlink()

    def forget_stages(self, first: int, *, with_training: bool) -> None:
        """Removes what stages from ``first`` on have left; of the training of ``first`` itself only where asked to.

        What a later stage has was made from what this one had then.
        """
        for parent in ("training", "stages", "hidden"):
            for folder in (self.path / parent).glob("*[0-9]"):
                number = int(folder.name.removeprefix("stage-"))
                if number > first or (number == first and (with_training or parent != "training")):
                    shutil.rmtree(folder)

    def drop_hidden(self, number: int) -> None:
        """Removes the hidden states that stage ``number`` has left, if there are any."""
        shutil.rmtree(self.path / "hidden" / f"stage-{number}", ignore_errors=True)

    def metrics_before(self, number: int) -> int:
        """How long ``metrics.jsonl`` was when training of stage ``number`` began."""
        if number > 1:
            return read_json(self.training(number - 1) / "result.json", needs=("metrics_size",))["metrics_size"]
        return self.log.first_line_size()  # the start event

    def keep_stage(self, number: int, entry: ExitStage, *, criterion: str) -> None:
        entry.save(self.stage(number), criterion=criterion)

    def finish(
        self, results: dict[str, Any], stages: list[ExitStage], base: BaseModel, heat_map: dict[str, Any]
    ) -> None:
        """Writes what the run leaves and removes what only a run under way needs."""
        write_json(self.path / "cascade.json", self._cascade(results, stages, base))
        write_json(self.path / "config.json", self._model_config(results, stages, base))
        write_heat_map(self.path, heat_map)
        write_json(self.path / "results.json", results)
        write_report(self.path)
        self.log.write("end", seconds=results["final"]["seconds"])
        self.clean()

    def clean(self) -> None:
        for name in ("training", "hidden"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _model_config(self, results: dict[str, Any], stages: list[ExitStage], base: BaseModel) -> dict[str, Any]:
        """The run's record together with the cascade's configuration: the folder loads as a model."""
        record = self.record
        if results["settings"]["criterion"] not in model_criteria():  # loading it says so
            return {**record, "model_type": CascadeConfig.model_type, "criterion": results["settings"]["criterion"]}
        final, tokens = results["final"], results["tokens"]
        ppl = {
            "validation": (tokens["val"], results["base"]["val_ppl"], final["all_token_val_ppl"]),
            "test": (tokens["test"], final["base_test_ppl"], final["all_token_test_ppl"]),
        }
        config = CascadeConfig(
            base_config=base.config,
            base=_reference(base),
            criterion=results["settings"]["criterion"],
            stages=[{**entry.stage.config.to_dict(), "threshold": entry.threshold} for entry in stages],
            self_contained=False,
            settings=results["settings"],
            measured={
                split: {"tokens": n, "base_ppl": before, "cascade_ppl": after}
                for split, (n, before, after) in ppl.items()
                if after is not None
            },
            architectures=["CascadeForCausalLM"],
            dtype=record["machine"]["dtype"],
        )
        return {**record, **{k: v for k, v in json.loads(config.to_json_string()).items() if k not in record}}

    def _cascade(self, results: dict[str, Any], stages: list[ExitStage], base: BaseModel) -> dict[str, Any]:
        """Ties base, stages and thresholds together."""
        settings = results["settings"]
        return {
            "format": CASCADE_FORMAT,
            "base": _reference(base),
            "criterion": settings["criterion"],
            "kind": settings["stage_kind"],
            "reads": stages[0].stage.config.reads if stages else None,
            "stages": [
                {"folder": f"stages/{n}", "threshold": entry.threshold, "layers": entry.stage.config.layers}
                for n, entry in enumerate(stages, 1)
            ],
        }


def _choose(settings: RunSettings) -> Path:
    """``--out``; else, when resuming, the newest unfinished run of the preset; else a new folder."""
    if settings.out is not None:
        return Path(settings.out)
    if settings.resume == "auto":
        for path in sorted(RUNS.glob(f"*-{settings.preset}"), reverse=True):
            if ((path / "config.json").is_file() and not RunFolder(path).finished) or _only_leftovers(path):
                return path
    now = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{now}-{settings.preset}", *(f"{now}.{n}-{settings.preset}" for n in range(2, 100)))  # within one second
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def _only_leftovers(path: Path) -> bool:
    """Whether nothing is there but what a process leaves that is killed before it has written anything."""
    return path.is_dir() and all(p.name == LOCK or is_temporary(p) for p in path.iterdir())


def _found(path: Path, resume: str, now: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run in ``path``, which may go on as ``now``; None where a new one may begin."""
    if not path.exists() or _only_leftovers(path):
        return None
    if not (path / "config.json").exists():
        raise InputError(f"out: {str(path)!r}; exists and is not the folder of a run")
    if resume == "never":
        raise InputError(f"out: {str(path)!r}; holds a run already: add --resume auto to go on, or name another")
    try:
        found = read_json(path / "config.json", needs=("settings", "fingerprints", "versions", "machine"))
    except DamagedFile as error:
        raise InputError(f"out: {error}; restore it, or train in another folder") from None
    _check_same(found, now, path)
    return found


def _reference(base: BaseModel) -> dict[str, Any]:
    names = ("name", "source", "revision", "fingerprint", "quantization")
    return {name: getattr(base, name) for name in names}


def _check_same(found: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    differences = []
    for name, value in now["settings"].items():
        before = saved_settings(found["settings"]).get(name)
        if name not in RESUME_MAY_CHANGE and before != value:
            differences.append(f"{name} was {before!r}, is {value!r}")
    for name, value in now["fingerprints"].items():
        if found["fingerprints"].get(name) != value:
            differences.append(
                f"the {name} has changed (fingerprint {found['fingerprints'].get(name)!s:.12} -> {value:.12})"
            )
    if differences:
        finished = "; it is finished: to train longer, begin a new run (it reuses the base pass)"
        raise InputError(
            f"resume: the run in {str(path)!r} is another one: {'; '.join(differences)}"
            f"{finished if RunFolder(path).finished else ''}"
        )


def _warn_versions(found: dict[str, Any], now: dict[str, Any]) -> None:
    for part in ("versions", "machine"):
        for name, value in now[part].items():
            if found[part].get(name) != value:
                say(f"note: {name} was {found[part].get(name)}, is {value}: results may differ in the last bits")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "datasets", "safetensors")
    return {"cascade_fast": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def _machine(compute: Compute) -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": compute.device_name,
        "dtype": compute.dtype_name,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
