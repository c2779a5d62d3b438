"""Rows of local files and of the hub, by ``datasets``: what can be read, and a line that names what cannot."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cascade_fast.input_checks import InputError, one_line, shown
from cascade_fast.settings import RunSettings

_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_JSON_START = re.compile(rb"[\s\xef\xbb\xbf]*(\{|\[\s*[\]{]|$)")  # an object, or a list of them
_IN_WORDS = {  # what datasets says of files that cannot be read
    "StopIteration": "it holds no rows",
    "Couldn't cast": "the files, or parts of one, differ in their columns or their types",
    "must have the same columns": "the files, or parts of one, differ in their columns or their types",  # datasets 4
    "No columns to parse": "it has no header line",
}


class Rows:
    """The rows of ``settings.dataset`` with their numbers, from 1 in the data's own order; shuffled if asked."""

    def __init__(self, source: Any, settings: RunSettings) -> None:
        self.columns: list[str] = list(source.column_names)
        self._source, self._settings = source, settings

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        count = len(self._source)
        order = order_of(count).tolist() if self._settings.shuffle == "on" else range(count)
        return ((number + 1, self._source[number]) for number in order)

    def where(self, number: int) -> str:
        return f"dataset: {shown(self._settings.dataset)}, row {number}"

    def select_columns(self, names: Iterable[str]) -> "Rows":
        return Rows(self._source.select_columns(list(dict.fromkeys(names))), self._settings)


def order_of(count: int) -> Any:
    """The shuffled order of ``count`` texts: always the same, so that runs of any seed have the same splits and share
    their base pass. NumPy's RandomState is frozen: other versions give the same numbers (NEP 19)."""
    return np.random.RandomState(0).permutation(count)


def load_rows(settings: RunSettings) -> Rows:
    """The rows of ``settings.dataset``. Raises InputError."""
    return Rows(_load(settings), settings)


def _load(settings: RunSettings) -> Any:
    dataset = settings.dataset
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in one line of ours
    datasets.disable_progress_bars()
    path = Path(dataset)
    if dataset and os.path.exists(dataset):
        return _read_files(dataset, *_local_files(path))
    if path.suffix in _SUFFIXES or path.is_absolute():
        raise InputError(f"dataset: {shown(dataset)}; no such file or folder")
    # A builder's name alone would read whatever lies in the current folder.
    builders = getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    if not _HUB_ID.fullmatch(dataset) or dataset in builders:
        raise InputError(f"dataset: {shown(dataset)}; no such file or folder, and no name of a dataset on the hub")
    from cascade_fast.base.model import hub_reachable

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # what has been downloaded before is still found
    try:
        return datasets.load_dataset(dataset, split="train")
    except Exception as error:
        raise InputError(
            f"dataset: {shown(dataset)}; not a local path, not 'pydoc', and not to be had from the Hugging Face Hub: "
            f"{one_line(error)}"
        ) from error


def _read_files(dataset: str, builder: str, files: list[Path]) -> Any:
    """The rows of local files. ``datasets`` takes a path for a pattern: it gets each escaped."""
    import datasets

    try:
        files = [file for file in files if file.stat().st_size > 0]
        for file in files:
            _check_file(file, builder)
    except OSError as error:
        raise InputError(f"dataset: {shown(dataset)} cannot be read: {error.strerror}") from error
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    empty = InputError(f"dataset: {shown(dataset)} is empty: it holds no text")
    if not files:
        raise empty
    paths = [glob.escape(str(file)) for file in files]
    try:
        rows = datasets.load_dataset(builder, data_files=paths, split="train", **options)
    except Exception as error:  # whatever the parser of the user's file raises
        reason = one_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise empty from error
        for said, words in _IN_WORDS.items():
            reason = words if said in reason else reason
        raise InputError(f"dataset: {shown(dataset)} cannot be read as {builder}: {reason}") from error
    if len(rows) == 0:
        raise empty
    return rows


def _check_file(file: Path, builder: str) -> None:
    """Raises InputError for what ``datasets`` would read as something else, or die of (JSON that begins with null)."""
    where = f"dataset: {str(file)!r}"
    # To datasets :: is a file within an archive and $HOME a variable's value, which nothing escapes.
    if "::" in str(file) or os.path.expandvars(file) != str(file):
        raise InputError(f"{where}; a path with '::' or a variable in it cannot be read: rename it")
    if builder == "parquet":
        return
    objects = "must hold JSON objects, one a line or a list of them"
    with file.open("rb") as lines:
        if builder == "json" and not _JSON_START.match(lines.read(2**20)):
            raise InputError(f"{where}; {objects}")
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{where}, line {number}: byte {line[error.start]:#04x} is not UTF-8; save the file as UTF-8"
                ) from None
            if builder == "json" and line.rstrip() == b"null":
                raise InputError(f"{where}, line {number}: null; {objects}")


def _local_files(path: Path) -> tuple[str, list[Path]]:
    """The ``datasets`` builder for ``path`` and the files it reads, sorted."""
    try:
        files = sorted(p for p in path.rglob("*") if _is_data(p.relative_to(path))) if path.is_dir() else [path]
    except OSError as error:
        raise InputError(f"dataset: {str(path)!r}; the folder cannot be read: {error.strerror}") from error
    kinds = {_SUFFIXES.get(p.suffix) for p in files}
    allowed = ", ".join(_SUFFIXES)
    if not files:
        raise InputError(f"dataset: {str(path)!r}; the folder holds no file of {allowed}")
    if len(kinds) > 1:
        raise InputError(
            f"dataset: {str(path)!r}; the folder mixes kinds of files: {', '.join(sorted(map(str, kinds)))}"
        )
    (kind,) = kinds
    if kind is None:
        raise InputError(f"dataset: {str(path)!r}; must be a file of {allowed}, or a folder of them")
    return kind, [p.absolute() for p in files]


def _is_data(path: Path) -> bool:
    """Of a folder's files; hidden ones are copies that tools keep, as in ``.ipynb_checkpoints``."""
    return path.suffix in _SUFFIXES and not any(part.startswith(".") for part in path.parts)
