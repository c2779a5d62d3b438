"""The folder of a run: what is in it, who may use it, and in which state it is.

config.json         every setting as used, versions, machine, fingerprints of base and data; once finished, also the
                    cascade as ``AutoModelForCausalLM`` reads it
metrics.jsonl       a record for each epoch and event
stages/1/ ...       model.safetensors: the weights of the stages that are kept
results.json        the numbers; report.md, report.html and *.png show them
heat_map.json       some validation text, token by token; report.html shows it
samples.json        some text as base and cascade write it; made by train after the end, the reports show it
trackers.json       which trackers (``report_to``) follow the run, and its id there; tensorboard/ and wandb/ are theirs
training/, hidden/  checkpoints and hidden states of a run under way; removed when it is finished

Runs of earlier versions also have cascade.json and stages/<n>/config.json, which nobody reads.
"""

import contextlib
import dataclasses
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from cascade_fast.input_checks import InputError
from cascade_fast.records import FinetuneResults, FinishedStage, RunRecord, RunResults, StageRecord, any_results
from cascade_fast.resume import fingerprint_differences, settings_differences, version_notes
from cascade_fast.runtime.console import say
from cascade_fast.runtime.files import (
    DamagedFile,
    LockHeld,
    acquire_lock,
    clear_temporaries,
    is_temporary,
    load_record,
    load_tensors,
    read_json,
    write_json,
)
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.runtime.processes import by_first, processes
from cascade_fast.runtime.shared_folder import check_shared
from cascade_fast.settings import RunSettings

RUNS = Path("runs")
LOCK = "run.lock"
CONFIG = "config.json"
RESULTS = "results.json"
REPORT = "report.md"


def read_results(folder: Path) -> RunResults:
    """The results of a cascade's run. Raises DamagedFile."""
    return load_record(folder / RESULTS, RunResults.from_dict)


def read_any_results(folder: Path) -> RunResults | FinetuneResults:
    """The results of a cascade's run or of a fine-tune. Raises DamagedFile."""
    return load_record(folder / RESULTS, any_results)


def write_results(folder: Path, results: RunResults | FinetuneResults) -> None:
    write_json(folder / RESULTS, results.to_dict())


class RunFolder:
    """Locked for one process while open; use as a context manager.

    ``record`` is what ``config.json`` says of the run; ``now``, what it would say of one that began now; ``new``,
    whether this one does.
    """

    def __init__(self, path: Path, record: RunRecord, *, now: RunRecord, new: bool) -> None:
        self.path, self.record = path, record
        self.now, self.new = now, new
        self.log = MetricsLog(path / "metrics.jsonl")
        self._lock: filelock.BaseFileLock | None = None

    @classmethod
    def find(cls, settings: RunSettings, now: RunRecord) -> "RunFolder":
        """The folder of a new run, or of the one to go on with. Nothing in it is touched.

        Args:
            now: the record of the run as it would begin now.

        Raises:
            InputError: the folder is something else, holds a run that may not be resumed (and how it differs), or
                cannot be read.
        """
        path = Path(processes().of_first(str(_choose(settings))))
        with _usable(path):
            found = _found(path, settings.resume, now)
        processes().wait()  # nobody begins to write before all have seen what is there
        return cls(path, now if found is None else found, now=now, new=found is None)

    def open(self, *, kv: str | None) -> "RunFolder":
        """Locks the folder, cleans up after a process that was killed, and begins the records of a new run.

        Args:
            kv: what ``kv: auto`` is settled to.

        Raises:
            InputError: it cannot be written, or is in use by another process. Nothing in it has been touched then.
        """
        self.record = dataclasses.replace(self.record, kv=kv)
        self._open()
        try:
            check_shared(self.path, "out", "--out")
        except BaseException:
            self.__exit__()
            raise
        return self

    @by_first
    def _open(self) -> None:
        with _usable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise

    def _acquire(self) -> None:
        file = self.path / LOCK
        if file.is_symlink():
            raise InputError(f"out: {str(self.path)!r}; its {LOCK} is a link, which is no lock: remove it")
        try:
            self._lock = acquire_lock(file, timeout=0)
        except LockHeld as held:
            raise InputError(f"out: {str(self.path)!r}; another process is training there{held.hint}") from None

    def _start(self) -> None:
        clear_temporaries(self.path)
        if self.new:
            write_json(self.config, self.record.to_dict())
        elif not self.finished:
            for line in version_notes(self.record, self.now):
                say(line)
        if self.log.first_line_size() == 0 and not self.finished:
            if any(self.path.glob("training/*")):
                say(f"note: {self.log.path.name} is missing or damaged; its records so far are lost")
            self.log.truncate(0)
            self.log.write("start", preset=self.record.settings["preset"])

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.trackers.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def finished(self) -> bool:
        return is_finished(self.path)

    def check(self) -> None:
        """Of a finished run: raises DamagedFile where a file that holds its result is not whole."""
        results = read_results(self.path)
        read_json(self.config)
        for number in range(1, results.final.stages_kept + 1):
            load_tensors(self.stage(number) / "model.safetensors")

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def stage(self, number: int) -> Path:
        return self.path / "stages" / str(number)

    def training(self, number: int) -> Path:
        return self.path / "training" / f"stage-{number}"

    def hidden(self, number: int, split: str) -> Path:
        return self.path / "hidden" / f"stage-{number}" / split

    def _result(self, number: int) -> Path:
        return self.training(number) / "result.json"

    def stage_record(self, number: int) -> StageRecord | None:
        """The record of a stage whose training is over, kept or not. Raises DamagedFile."""
        path = self._result(number)
        return load_record(path, FinishedStage.from_dict).record if path.exists() else None

    @by_first
    def write_stage_record(self, number: int, record: StageRecord, metrics_size: int) -> None:
        """Marks the stage as done; its checkpoints are no longer needed."""
        write_json(self._result(number), FinishedStage(record=record, metrics_size=metrics_size).to_dict())
        for file in self.training(number).glob("*.safetensors"):
            file.unlink()

    @by_first
    def forget_stages(self, first: int, *, with_training: bool) -> None:
        """Removes what stages from ``first`` on have left; of the training of ``first`` itself only where asked to.

        What a later stage has was made from what this one had then.
        """
        for parent in ("training", "stages", "hidden"):
            for folder in (self.path / parent).glob("*[0-9]"):
                number = int(folder.name.removeprefix("stage-"))
                if number > first or (number == first and (with_training or parent != "training")):
                    shutil.rmtree(folder)

    @by_first
    def drop_hidden(self, number: int) -> None:
        """Removes the hidden states that stage ``number`` has left, if there are any."""
        shutil.rmtree(self.path / "hidden" / f"stage-{number}", ignore_errors=True)

    def metrics_before(self, number: int) -> int:
        """How long ``metrics.jsonl`` was when training of stage ``number`` began."""
        if number == 1:
            return self.log.first_line_size()  # the start event
        return load_record(self._result(number - 1), FinishedStage.from_dict).metrics_size

    @by_first
    def clean(self) -> None:
        for name in ("training", "hidden"):
            shutil.rmtree(self.path / name, ignore_errors=True)


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Raises InputError where the system does not let us use the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"out: {str(path)!r}; cannot be used: {error.strerror or error}") from error


def is_finished(path: Path) -> bool:
    """Whether the folder holds a run that has written all there is to write."""
    return (path / RESULTS).is_file() and (path / REPORT).is_file()


def _choose(settings: RunSettings) -> Path:
    """``--out``; else, when resuming, the newest unfinished run of the preset; else a new folder."""
    if settings.out is not None:
        return Path(settings.out)
    if settings.resume == "auto":
        for path in sorted(RUNS.glob(f"*-{settings.preset}"), reverse=True):
            if ((path / CONFIG).is_file() and not is_finished(path)) or _only_leftovers(path):
                return path
    now = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{now}-{settings.preset}", *(f"{now}.{n}-{settings.preset}" for n in range(2, 100)))  # within one second
    return next(RUNS / name for name in names if not (RUNS / name).exists())


def _only_leftovers(path: Path) -> bool:
    """Whether nothing is there but what a process leaves that is killed before it has written anything."""
    return path.is_dir() and all(p.name == LOCK or is_temporary(p) for p in path.iterdir())


def _found(path: Path, resume: str, now: RunRecord) -> RunRecord | None:
    """The record of the run in ``path``, which may go on as ``now``; None where a new one may begin."""
    if not path.exists() or _only_leftovers(path):
        return None
    if not (path / CONFIG).exists():
        raise InputError(f"out: {str(path)!r}; exists and is not the folder of a run")
    if resume == "never":
        raise InputError(f"out: {str(path)!r}; holds a run already: add --resume auto to go on, or name another")
    try:
        found = load_record(path / CONFIG, RunRecord.from_dict)
    except DamagedFile as error:
        raise InputError(f"out: {error}; restore it, or train in another folder") from None
    differences = settings_differences(found.settings, now.settings)
    differences += fingerprint_differences(found.fingerprints, now.fingerprints)
    if differences:
        finished = "; it is finished: to train longer, begin a new run (it reuses the base pass)"
        raise InputError(
            f"resume: the run in {str(path)!r} is another one: {'; '.join(differences)}"
            f"{finished if is_finished(path) else ''}"
        )
    return found


def check_run(folder: Path, *, results: bool = False) -> None:
    """Makes sure that ``folder`` holds a finished run or, unless ``results`` are needed too, a saved cascade.

    Raises:
        InputError: it holds something else, a run that is still training, or one that was interrupted.
    """
    if not folder.is_dir():
        raise InputError(f"RUN: {str(folder)!r}; {'is a file' if folder.exists() else 'no such folder'}")
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG)
    elif (folder / LOCK).exists() and all(path.name == LOCK or is_temporary(path) for path in folder.iterdir()):
        config = {"machine": None}  # a run that has only just begun
    else:
        raise InputError(f"RUN: {str(folder)!r}; is not the folder of a run: it has no config.json")
    if not {"machine", "model_type"} & config.keys():
        raise InputError(f"RUN: {str(folder)!r}; its config.json is not that of a run or of a cascade")
    if "machine" not in config and results:
        raise InputError(f"RUN: {str(folder)!r}; holds a saved model: results are in the folder of its run")
    if "model_type" in config and (not results or (folder / RESULTS).exists()):
        return
    if _in_use(folder / LOCK):
        raise InputError(f"RUN: {str(folder)!r}; is still training: no results yet")
    raise InputError(
        f"RUN: {str(folder)!r}; the run was interrupted: no results yet. The command that began it goes on with "
        f"--out {shlex.quote(str(folder))} --resume auto"
    )


def _in_use(lock: Path) -> bool:
    """Whether another process holds the lock; no where that cannot be found out, as in a read-only folder."""
    if not lock.exists():
        return False
    try:
        acquire_lock(lock, timeout=0).release()
    except LockHeld:
        return True
    except OSError:
        pass
    return False
