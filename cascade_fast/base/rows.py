"""Rows of local files and of the hub, numbered as they lie in the data, and a line that names what cannot be read.

``datasets`` reads the hub, and keeps tables on disk so that their rows can be taken in any order. Files of a stream are
read row by row (``row_files``), as are ``.txt`` files, a row each, and JSON in encodings that ``datasets`` cannot read.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cascade_fast.base.row_files import (
    SUFFIXES,
    begins_with_a_marked_list,
    check_encoding,
    check_file,
    file_rows,
    file_where,
    marked_codec,
    read_document,
)
from cascade_fast.input_checks import InputError, one_line, shown
from cascade_fast.settings import RunSettings

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FIRST_ROWS = 100  # whose columns are those of a stream of JSON, where a row may lack some
_IN_WORDS = {  # what datasets says of files that cannot be read
    "StopIteration": "it holds no rows",
    "Couldn't cast": "the files, or parts of one, differ in their columns or their types",
    "must have the same columns": "the files, or parts of one, differ in their columns or their types",  # datasets 4
    "No columns to parse": "it has no header line",
}


class Rows:
    """The rows of ``settings.dataset``, as :func:`load_rows` finds them.

    Iterating gives ``(number, row)``: the row's number from 1 in the data's own order, and its columns as plain Python
    values. They come shuffled if ``settings.shuffle`` is on: all rows, or a stream's among ``shuffle_buffer`` of them.

    Attributes:
        columns: their names. Of a stream that does not know them, those of its first rows.
    """

    def __init__(self, source: Any, columns: list[str], settings: RunSettings, files: "_Files | None" = None) -> None:
        self.columns = columns
        self._source, self._settings, self._files = source, settings, files

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        source = self._source
        count = len(source) if isinstance(source, Sized) else None
        if self._settings.shuffle == "off":
            yield from enumerate(self._read(source), 1)
        elif count is not None:
            order = order_of(count)
            yield from zip((order + 1).tolist(), self._read(source[number] for number in order.tolist()), strict=True)
        else:
            yield from shuffled_stream(enumerate(self._read(source), 1), self._settings.shuffle_buffer)

    def _read(self, source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """With every column in each row, and errors in one line."""
        empty, rows, count = dict.fromkeys(self.columns), iter(source), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except InputError:
                raise
            except Exception as error:  # whatever a reader or the network raises
                where = f"dataset: {shown(self._settings.dataset)}"
                raise InputError(f"{where} cannot be read after {count} rows: {one_line(error)}") from error
            count += 1
            yield {**empty, **row}

    def where(self, number: int) -> str:
        """The beginning of a message about a row: which file it is in, and its number there. Of several files, it
        counts their rows."""
        files = self._files
        if files is not None:
            for file in files.paths:
                if files.builder == "text":
                    count = 1
                elif len(files.paths) == 1:
                    return f"{file_where(file)}, row {number}"
                else:
                    try:
                        count = sum(1 for _ in islice(files.rows_of(file), number))
                    except InputError:
                        break
                if number <= count:
                    return file_where(file) + (f", row {number}" if files.builder != "text" else "")
                number -= count
        return f"dataset: {shown(self._settings.dataset)}, row {number}"

    def select_columns(self, names: Iterable[str]) -> "Rows":
        """The same rows with these columns: what is not read need not be decoded (images, sound)."""
        names = list(dict.fromkeys(names))
        select = getattr(self._source, "select_columns", None)
        if select is None:
            return self
        return Rows(select(names), names, self._settings, self._files)


def order_of(count: int) -> Any:
    """The shuffled order of ``count`` texts: always the same, so that runs of any seed have the same splits and share
    their base pass. NumPy's RandomState is frozen: other versions give the same numbers (NEP 19)."""
    return np.random.RandomState(0).permutation(count)


def shuffled_stream(rows: Iterable[Any], buffer_size: int) -> Iterator[Any]:
    """``rows`` shuffled among ``buffer_size`` of them: each leaves a buffer by chance, and the next takes its place.

    As :func:`order_of` where the buffer holds all of them. The shuffle of ``datasets`` loses the rows' numbers, and
    its order changes between releases.
    """
    rows = iter(rows)
    buffer = list(islice(rows, buffer_size))
    random = np.random.RandomState(0)
    for row in rows:
        place = random.randint(len(buffer))
        yield buffer[place]
        buffer[place] = row
    for place in random.permutation(len(buffer)):
        yield buffer[place]


def load_rows(settings: RunSettings) -> Rows:
    """The rows of ``settings.dataset``; with ``settings.streaming`` on, read only as far as they are asked for.

    Raises:
        InputError: no such dataset, or one that cannot be read. Of a stream, also when the rows are read.
    """
    dataset = settings.dataset
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in one line of ours
    datasets.disable_progress_bars()
    path = Path(dataset)
    if dataset and os.path.exists(dataset):
        builder, paths = _local_files(path)
        return _load_files(settings, _Files(paths, builder, check_encoding(settings.encoding)))
    if path.suffix in SUFFIXES or path.is_absolute():
        raise InputError(f"dataset: {shown(dataset)}; no such file or folder")
    # A builder's name alone would read whatever lies in the current folder.
    builders = getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    if not _HUB_ID.fullmatch(dataset) or dataset in builders:
        raise InputError(f"dataset: {shown(dataset)}; no such file or folder, and no name of a dataset on the hub")
    from cascade_fast.base.model import hub_reachable

    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # what has been downloaded before is still found
    try:
        rows = datasets.load_dataset(dataset, split="train", streaming=settings.streaming == "on")
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:
        raise InputError(
            f"dataset: {shown(dataset)}; not a local path, not 'pydoc', and not to be had from the Hugging Face Hub: "
            f"{one_line(error)}"
        ) from error
    return Rows(rows, columns, settings)


class _Files:
    """Local files of one kind; iterating reads their rows one after another."""

    def __init__(self, paths: list[Path], builder: str, encoding: str) -> None:
        self.paths, self.builder, self.encoding = paths, builder, encoding
        self.columns: list[str] = []

    def rows_of(self, file: Path) -> Iterator[dict[str, Any]]:
        return file_rows(file, self.builder, self.encoding)

    def find_columns(self) -> None:
        """From the first rows of the first file that has any. Of a table one row tells them all."""
        for file in self.paths:
            first = islice(self.rows_of(file), _FIRST_ROWS if self.builder == "json" else 1)
            self.columns = list(dict.fromkeys(name for row in first for name in row))
            if self.columns:
                return

    def __iter__(self) -> Iterator[dict[str, Any]]:
        known = set(self.columns)
        for file in self.paths:
            for number, row in enumerate(self.rows_of(file), 1):
                # In JSON a row may lack a column or have one of its own, but not all of them.
                fits = row.keys() & known or not row if self.builder == "json" else row.keys() == known
                if known and not fits:
                    raise InputError(
                        f"{file_where(file)}, row {number} has columns {', '.join(row)}; those of the first rows are "
                        f"{', '.join(self.columns)}"
                    )
                yield row


class _Documents(Sequence[dict[str, Any]]):
    """Text files, a row each, read when it is asked for."""

    def __init__(self, files: _Files) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, number: Any) -> Any:
        return {"text": read_document(self.files.paths[number], self.files.encoding)}


def _load_files(settings: RunSettings, files: _Files) -> Rows:
    """The rows of local files. What is no stream is checked as a whole before anything is made of it."""
    where, streaming = f"dataset: {shown(settings.dataset)}", settings.streaming == "on"
    try:
        files.paths = [file for file in files.paths if file.stat().st_size > 0]
        for file in files.paths:
            check_file(file, files.builder, files.encoding, whole=not streaming)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    empty = InputError(f"{where} is empty: it holds no text")
    if not files.paths:
        raise empty
    if files.builder == "text":
        return Rows(_Documents(files), ["text"], settings, files)
    by_rows = files.builder == "json" and (
        files.encoding != "utf-8" or any(begins_with_a_marked_list(file) for file in files.paths)
    )  # datasets decodes no list but UTF-8's, and cuts lines by bytes
    if streaming or by_rows:
        files.find_columns()
        if not files.columns:
            raise empty
        return Rows(files if streaming else list(files), files.columns, settings, files)
    rows = _load_tables(settings, files, empty)
    return Rows(rows, rows.column_names, settings, files)


def _load_tables(settings: RunSettings, files: _Files, empty: InputError) -> Any:
    """A ``datasets.Dataset``. ``datasets`` takes a path for a pattern: it gets each escaped."""
    import datasets

    builder, options = files.builder, {}
    if builder == "csv" and files.encoding != "utf-8":
        options["encoding"] = marked_codec(files.paths[0], files.encoding)
    paths = [glob.escape(str(file.absolute())) for file in files.paths]
    try:
        rows = datasets.load_dataset(builder, data_files=paths, split="train", **options)
    except Exception as error:  # whatever the parser of the user's file raises
        reason = one_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise empty from error
        for said, words in _IN_WORDS.items():
            reason = words if said in reason else reason
        differs = _find_damage(files)
        where = f"dataset: {shown(settings.dataset)}"
        raise InputError(f"{where} cannot be read as {builder}: {reason}{differs}") from error
    if len(rows) == 0:
        raise empty
    return rows


def _find_damage(files: _Files) -> str:
    """How the columns of two files differ, if they do. Raises InputError, with the line, if one of the files cannot be
    read by itself."""
    differs, columns_before = "", None
    for file in files.paths:
        columns: list[str] = []
        for row in files.rows_of(file):
            columns = columns or list(row)
        if columns_before is not None and set(columns) != set(columns_before) and not differs:
            differs = f": {str(file)!r} has {', '.join(columns)}; those before it have {', '.join(columns_before)}"
        columns_before = columns_before or columns
    return differs


def _local_files(path: Path) -> tuple[str, list[Path]]:
    """The ``datasets`` builder for ``path`` and the files it reads, sorted."""
    try:
        files = sorted(p for p in path.rglob("*") if _is_data(p.relative_to(path))) if path.is_dir() else [path]
    except OSError as error:
        raise InputError(f"dataset: {str(path)!r}; the folder cannot be read: {error.strerror}") from error
    kinds = {SUFFIXES.get(p.suffix) for p in files}
    allowed = ", ".join(SUFFIXES)
    if not files:
        raise InputError(f"dataset: {str(path)!r}; the folder holds no file of {allowed}")
    if len(kinds) > 1:
        raise InputError(
            f"dataset: {str(path)!r}; the folder mixes kinds of files: {', '.join(sorted(map(str, kinds)))}"
        )
    (kind,) = kinds
    if kind is None:
        raise InputError(f"dataset: {str(path)!r}; must be a file of {allowed}, or a folder of them")
    return kind, files


def _is_data(path: Path) -> bool:
    """Of a folder's files; hidden ones are copies that tools keep, as in ``.ipynb_checkpoints``."""
    return path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)
