"""One local file: its rows, one by one, and what is wrong with it, by file and line."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade_fast.input_checks import InputError, one_line, shown

SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_CSV_ROWS = 10_000  # read at once, as datasets does: whether a column holds numbers is told by so many rows
_PARQUET_ROWS = 500
_BEGINNING = 2**20  # bytes of a file that are checked before it is streamed
_JSON_START = re.compile(r"[\s\ufeff]*(\{|\[\s*[\]{]|$)")  # an object, or a list of them
_JSON = "must hold JSON objects, one a line or a list of them"
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Byte order marks, and the codecs that take them for what they are. That of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


def file_where(file: Path) -> str:
    """The beginning of a message about a file."""
    return f"dataset: {str(file)!r}"


def check_encoding(encoding: str) -> str:
    """``encoding``, spelt as ``utf-8`` where it is one of Unicode's. Raises InputError for what is none of text."""
    try:
        "a".encode(encoding)
        name = codecs.lookup(encoding).name
        return name if name.startswith("utf") else encoding
    except (LookupError, ValueError):
        raise InputError(
            f"encoding: {shown(encoding)}; must be an encoding of text that Python knows, such as utf-8, latin-1, "
            "cp1252 or utf-16"
        ) from None


def _mark(file: Path) -> str | None:
    """The codec of the byte order mark that the file begins with."""
    with file.open("rb") as content:
        head = content.read(4)
    return next((codec for mark, codec in _MARKS if head.startswith(mark)), None)


def _family(codec: str) -> str:
    """``utf-16`` of ``utf-16-le``, ``utf-8`` of ``utf-8-sig``."""
    return "-".join(codec.split("-")[:2])


def marked_codec(file: Path, encoding: str) -> str:
    """``encoding``, or the codec of the same family that takes the file's byte order mark for one, not for text."""
    mark = _mark(file)
    return mark if mark is not None and _family(mark) == _family(encoding) else encoding


def begins_with_a_marked_list(file: Path) -> bool:
    """A byte order mark and then a JSON list: ``datasets`` takes it for a broken object."""
    with file.open("rb") as content:
        head = content.read(2**10)
    return head.startswith(codecs.BOM_UTF8) and head[len(codecs.BOM_UTF8) :].lstrip().startswith(b"[")


# --- checks ----------------------------------------------------------------------------------------------------------


def check_file(file: Path, builder: str, encoding: str, *, whole: bool) -> None:
    """Raises InputError for what would be read as something else than it is, or die in the reader (JSON that begins
    with null).

    Args:
        whole: look at all of it; else at its beginning, and only when its rows are read.
    """
    # To datasets :: is a file within an archive and $HOME a variable's value, which nothing escapes.
    absolute = str(file.absolute())
    if "::" in absolute or os.path.expandvars(absolute) != absolute:
        raise InputError(f"{file_where(file)}; a path with '::' or a variable in it cannot be read: rename it")
    if builder == "parquet" or not whole:
        return
    _check_text(file, builder, encoding)
    if builder == "json":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() == b"null":
                    raise InputError(f"{file_where(file)}, line {number}: null; {_JSON}")


def _check_text(file: Path, builder: str, encoding: str, most: int | None = None) -> None:
    """Raises InputError unless the file (its first ``most`` bytes) is text in ``encoding``, and JSON begins as such."""
    decoder = codecs.getincrementaldecoder(marked_codec(file, encoding))()
    line, first = 1, True
    with file.open("rb") as content:
        head = content.read(8)
        packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
        if packed:
            raise InputError(f"{file_where(file)} is packed with {packed}; unpack it")
        mark = _mark(file)
        if mark == "utf-8-sig" and _family(encoding) != "utf-8":
            raise InputError(f"{file_where(file)}; the file begins as UTF-8 does: --encoding utf-8")
        content.seek(0)
        while chunk := content.read(_BEGINNING):
            read = content.tell()
            last = read == os.fstat(content.fileno()).st_size
            try:
                text = decoder.decode(chunk, last)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                byte = f"byte {error.object[error.start]:#04x} is not {_name(encoding)}"
                raise InputError(f"{file_where(file)}, line {line}: {byte}; {_advice(mark, chunk, encoding)}") from None
            except UnicodeError as error:  # UTF-16 or UTF-32 without a mark
                raise InputError(
                    f"{file_where(file)} is not {_name(encoding)}: {one_line(error)}; name its real encoding, such as "
                    f"--encoding utf-8 or {encoding}-le"
                ) from None
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                advice = _advice(mark, chunk, encoding)
                raise InputError(f"{file_where(file)}, line {line}: the character zero; {advice}")
            if builder == "json" and first and not _JSON_START.match(text):
                raise InputError(f"{file_where(file)}; {_JSON}")
            line, first = line + text.count("\n"), False
            if most is not None and read >= most:
                return


def _name(encoding: str) -> str:
    return encoding.upper() if encoding.startswith("utf") else encoding


def _advice(mark: str | None, chunk: bytes, encoding: str) -> str:
    if mark is not None and _family(mark) != _family(encoding):
        return f"the file begins as {mark.upper()} does: --encoding {mark}"
    if b"\0" in chunk:
        return "it is no text, or UTF-16 without its mark: --encoding utf-16-le"
    if _family(encoding) == "utf-8":
        return "save the file as UTF-8, or name its encoding, such as --encoding latin-1"
    return "name the file's real encoding, such as --encoding utf-8"


# --- rows ------------------------------------------------------------------------------------------------------------


def file_rows(file: Path, builder: str, encoding: str) -> Iterator[dict[str, Any]]:
    """The rows of one file, read as they are asked for.

    Raises:
        InputError: what has been read so far is damaged; with the line, where there are lines.
    """
    try:
        if builder == "text":
            yield {"text": read_document(file, encoding)}
            return
        if builder != "parquet":
            _check_text(file, builder, encoding, most=_BEGINNING)
        if builder == "json":
            yield from _json_rows(file, encoding)
        else:
            yield from _csv_rows(file, encoding) if builder == "csv" else _parquet_rows(file)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file_where(file)} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # whatever the parser of the user's file raises
        if isinstance(error, UnicodeError):
            _check_text(file, builder, encoding)  # says in which line
        raise InputError(f"{file_where(file)} cannot be read as {builder}: {one_line(error)}") from error


def read_document(file: Path, encoding: str) -> str:
    """The text of a file, its line ends as one newline each. Raises InputError."""
    try:
        _check_text(file, "text", encoding, most=_BEGINNING)
        text = file.read_text(encoding=marked_codec(file, encoding))
    except OSError as error:
        raise InputError(f"{file_where(file)} cannot be read: {error.strerror}") from error
    except UnicodeError:
        text = "\0"
    if "\0" in text:
        _check_text(file, "text", encoding)
    return text


def _csv_rows(file: Path, encoding: str) -> Iterator[dict[str, Any]]:
    """As ``datasets`` reads it, with the types of values and the empty cells that pandas finds."""
    import pandas
    import pyarrow

    with pandas.read_csv(file, encoding=marked_codec(file, encoding), chunksize=_CSV_ROWS) as frames:
        for frame in frames:
            yield from pyarrow.Table.from_pandas(frame, preserve_index=False).to_pylist()


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    # With pre_buffer, the default, a whole row group is in memory, which may be the whole file.
    with ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
        for batch in table.iter_batches(_PARQUET_ROWS, use_threads=False):
            yield from batch.to_pylist()


def _json_rows(file: Path, encoding: str) -> Iterator[dict[str, Any]]:
    """Of JSON Lines, a line at a time. A list, or an object over several lines, is read as a whole."""
    with file.open(encoding=marked_codec(file, encoding)) as lines:
        first = True
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            text = line.rstrip()
            try:
                values = _values(text)
            except json.JSONDecodeError as error:
                if not first or error.pos < len(text):
                    raise _broken(file, number, error) from None
                text = line + lines.read()
                try:
                    values = _values(text)
                except json.JSONDecodeError as error:
                    raise _broken(file, number, error) from None
            if first and len(values) == 1 and isinstance(values[0], list):
                values = values[0]
            for value in values:
                if not isinstance(value, dict):
                    raise InputError(f"{file_where(file)}, line {number}: {shown(json.dumps(value))[1:-1]}; {_JSON}")
                if _SURROGATE.search(text):
                    _check_characters(file, number, value)
                yield value
            first = False


def _values(text: str) -> list[Any]:
    decoder, values = json.JSONDecoder(), []
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists
            raise json.JSONDecodeError(one_line(error), text, at) from None
        values.append(value)
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    return values


def _broken(file: Path, number: int, error: json.JSONDecodeError) -> InputError:
    said = error.msg.removesuffix(" at")  # "Unterminated string starting at"
    return InputError(
        f"{file_where(file)}, line {number + error.lineno - 1} cannot be read as json: {said} at column {error.colno}"
    )


def _check_characters(file: Path, number: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(
            f"{file_where(file)}, line {number}: {half} is half of a surrogate pair; no text holds it"
        ) from None
