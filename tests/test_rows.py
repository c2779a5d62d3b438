"""Rows of local files: their order and numbers, encodings, and damaged files by file and line."""

import codecs
import csv
import gzip
import io
import json

import pytest

from cascade_fast.base.rows import load_rows
from cascade_fast.input_checks import InputError
from cascade_fast.settings import make_settings

HOW = ("off", "on")  # streaming


def _rows(dataset, **settings):
    return load_rows(make_settings({"dataset": str(dataset), "shuffle": "off", **settings}))


def _read(dataset, **settings):
    return [row for _, row in _rows(dataset, **settings)]


def _error(dataset, **settings):
    with pytest.raises(InputError) as raised:
        _read(dataset, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- order and numbers -----------------------------------------------------------------------------------------------


def test_the_shuffled_order_is_fixed_and_rows_keep_their_numbers(tmp_path):
    file = _lines(tmp_path / "x.jsonl", [{"text": f"{i:04d}"} for i in range(200)])
    rows = list(_rows(file, shuffle="on"))
    assert [row["text"] for _, row in rows][:6] == ["0018", "0170", "0107", "0098", "0177", "0182"]  # of every release
    assert all(int(row["text"]) == number - 1 for number, row in rows)
    assert sorted(number for number, _ in rows) == list(range(1, 201))
    assert [number for number, _ in _rows(file)] == list(range(1, 201))


@pytest.mark.parametrize("streaming", HOW)
def test_where_a_row_is(tmp_path, streaming):
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        _lines(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(1, count + 1)])
    rows = _rows(tmp_path, shuffle="on", streaming=streaming)
    found = {row["text"]: rows.where(number) for number, row in rows}
    assert len(found) == 6
    for text, where in found.items():
        assert where == f"dataset: {str(tmp_path / (text[0] + '.jsonl'))!r}, row {text[1]}"
    assert _rows(tmp_path / "a.jsonl").where(3) == f"dataset: {str(tmp_path / 'a.jsonl')!r}, row 3"


def test_where_a_text_file_is(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert _rows(tmp_path).where(2) == f"dataset: {str(tmp_path / 'b.txt')!r}"


@pytest.mark.parametrize("streaming", HOW)
def test_columns(tmp_path, streaming):
    file = _lines(tmp_path / "x.jsonl", [{"text": "a"}, {"n": 1, "text": None, "m": [{"role": "user"}]}])
    rows = _rows(file, streaming=streaming)
    assert rows.columns == ["text", "n", "m"]
    assert [row for _, row in rows] == [
        {"text": "a", "n": None, "m": None},
        {"text": None, "n": 1, "m": [{"role": "user"}]},
    ]
    assert list(_rows(file).select_columns(["n", "n"])) == [(1, {"n": None}), (2, {"n": 1})]


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "a"}\n\n{"text": "b"}',
        '{"text": "a"} {"text": "b"}\r\n',
        '[{"text": "a"}, {"text": "b"}]',
        ' [\n{"text": "a"},\n{"text": "b"}\n]\n',
        '{\n"text":\n "a"\n}\n{"text": "b"}\n',
    ],
)
@pytest.mark.parametrize("settings", [{}, {"streaming": "on"}, {"encoding": "latin-1"}], ids=str)
def test_json_however_it_is_laid_out(tmp_path, text, settings):
    (tmp_path / "x.json").write_text(text)
    assert _read(tmp_path / "x.json", **settings) == [{"text": "a"}, {"text": "b"}]


# --- encodings -------------------------------------------------------------------------------------------------------


def _written(kind, text):
    if kind == "txt":
        return text
    if kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([["text", "n"], [text, "1"]])
        return file.getvalue()
    row = json.dumps({"text": text, "n": 1}, ensure_ascii=False)
    return row + "\n" if kind == "jsonl" else f"[{row}]"


@pytest.mark.parametrize("streaming", HOW)
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("encoding", "text", "bom"),
    [
        ("UTF8", "caf\xe9 \u4e16", b""),
        ("utf-8", "caf\xe9 \u4e16", codecs.BOM_UTF8),
        ("utf-8-sig", "caf\xe9 \u4e16", b""),
        ("latin-1", "caf\xe9", b""),
        ("cp1252", "\u201ccaf\xe9\u201d", b""),
        ("shift_jis", "\u4e16\u754c\u30bd", b""),
        ("utf-16", "caf\xe9 \u010a \u4e16", b""),
        ("utf-16-le", "caf\xe9 \u010a \u4e16", codecs.BOM_UTF16_LE),
        ("utf-16-be", "caf\xe9 \u010a \u4e16", b""),
        ("utf-32", "caf\xe9 \u010a \u4e16", b""),
    ],
)
def test_every_kind_of_file_in_every_encoding(tmp_path, kind, encoding, text, bom, streaming):
    file = tmp_path / f"x.{kind}"
    file.write_bytes(bom + _written(kind, text).encode(encoding))
    rows = _rows(file, encoding=encoding, streaming=streaming)
    assert rows.columns == (["text"] if kind == "txt" else ["text", "n"])
    assert [row["text"] for _, row in rows] == [text]


def test_utf_16_lines_are_not_cut_by_bytes(tmp_path):
    """Byte 0x0a is half of some characters, and ``datasets`` cuts large files at it."""
    text = "\u0a0a\u010a" * 50
    content = "".join(json.dumps({"text": f"{i}{text}"}, ensure_ascii=False) + "\n" for i in range(300))
    (tmp_path / "x.jsonl").write_bytes(content.encode("utf-16"))
    assert [row["text"] for row in _read(tmp_path / "x.jsonl", encoding="utf-16")] == [f"{i}{text}" for i in range(300)]


def test_line_ends_of_windows(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\r\n\r\nc")
    assert _read(tmp_path / "x.txt") == [{"text": "a\nb\n\nc"}]


@pytest.mark.parametrize("encoding", ["utf-9", "base64", "rot13", "undefined", "", "a b", "\ud800"])
def test_what_is_no_encoding(tmp_path, encoding):
    (tmp_path / "x.txt").write_text("a")
    assert "must be an encoding of text that Python knows" in _error(tmp_path / "x.txt", encoding=encoding)


@pytest.mark.parametrize("streaming", HOW)
@pytest.mark.parametrize(
    ("name", "content", "encoding", "said"),
    [
        (
            "x.txt",
            "a\nb\ncaf\xe9".encode("latin-1"),
            "utf-8",
            ", line 3: byte 0xe9 is not UTF-8; save the file as UTF-8, or name its encoding, such as "
            "--encoding latin-1",
        ),
        ("x.csv", "text\ncaf\xe9\n".encode("latin-1"), "utf-8", ", line 2: byte 0xe9 is not UTF-8; save"),
        ("x.jsonl", '{"text": 1}\n{"text": "caf\xe9"}\n'.encode("latin-1"), "utf-8", ", line 2: byte 0xe9 is not UTF-"),
        ("x.txt", b"caf\x81", "cp1252", ", line 1: byte 0x81 is not cp1252; name the file's real encoding"),
        ("x.txt", "a".encode("utf-16"), "utf-8", ", line 1: byte 0xff is not UTF-8; the file begins as UTF-16 does: "),
        ("x.csv", "text\na".encode("utf-16"), "latin-1", ", line 1: the character zero; the file begins as UTF-16"),
        ("x.txt", b"abcd", "utf-16", " is not UTF-16: UTF-16 stream does not start with BOM; name its real encoding"),
        ("x.txt", codecs.BOM_UTF8 + b"a", "latin-1", "; the file begins as UTF-8 does: --encoding utf-8"),
        ("x.jsonl", '{"text": 1}'.encode("utf-16-le"), "utf-8", "--encoding utf-16-le"),
        ("x.txt", b"a\nb\0c", "utf-8", ", line 2: the character zero; it is no text"),
        ("x.txt", b"\x7fELF\x02\x01\x01\0\0\0", "latin-1", ", line 1: the character zero; it is no text"),
        ("x.jsonl", gzip.compress(b'{"text": 1}\n', mtime=0), "utf-8", " is packed with gzip; unpack it"),
        ("x.txt", b"PK\x03\x04abc", "latin-1", " is packed with zip; unpack it"),
    ],
)
def test_files_in_another_encoding_and_files_without_text(tmp_path, name, content, encoding, said, streaming):
    file = tmp_path / name
    file.write_bytes(content)
    assert f"dataset: {str(file)!r}" in (error := _error(file, encoding=encoding, streaming=streaming))
    assert said in error


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"streaming": "on"}, {"encoding": "latin-1"}], ids=str)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n\n{"text": "b', ", line 3 cannot be read as json: Unterminated string starting at column 10"),
        ('{"text": "a"}\n{"text"\n{"text": "c"}', ", line 2 cannot be read as json: Expecting ':' delimiter"),
        ('{"text": "a"}\nwhat\n', ", line 2 cannot be read as json: Expecting value at column 1"),
        ('[\n{"text": "a"},\n{"text": }]', ", line 3 cannot be read as json: Expecting value at column 10"),
        ('{"text": "a"}\nnull\n', ", line 2: null; must hold JSON objects, one a line or a list of them"),
        ('{"text": "a"}\n[1]\n', ", line 2: [1]; must hold JSON objects"),
        ('{"text": "a"}\n"b"\n', "; must hold JSON objects"),
        ("3\n", "; must hold JSON objects, one a line or a list of them"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', ", line 2: \\ud83d is half of a surrogate pair; no text holds it"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "\n", ", line 2 cannot be read as json: "),
        ('{"text": "a"}\n{"text": ' + "9" * 10_000 + "x\n", ", line 2 cannot be read as json: "),
        ("\n\n", " is empty: it holds no text"),
        ("[]", " is empty: it holds no text"),
    ],
)
def test_damaged_json(tmp_path, content, said, settings):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    error = _error(file, **settings)
    assert error.startswith(f"dataset: {str(file)!r}")
    assert said in error
    assert len(error) < 800 + len(str(file))


@pytest.mark.parametrize("streaming", HOW)
def test_damaged_tables(tmp_path, streaming):
    (tmp_path / "x.csv").write_text("text,b\n1,2\n1,2,3,4\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1xxxxPAR1")
    assert "x.csv' cannot be read as csv: Error tokenizing data. C error: Expected 2 fields in line 3, saw 4" in _error(
        tmp_path / "x.csv", streaming=streaming
    )
    assert "x.parquet' cannot be read as parquet: Parquet file size" in _error(
        tmp_path / "x.parquet", streaming=streaming
    )
    (tmp_path / "empty").mkdir()
    assert "the folder holds no file of .json, .jsonl" in _error(tmp_path / "empty", streaming=streaming)
    (tmp_path / "y.csv").write_text("text,b\n")
    assert _error(tmp_path / "y.csv", streaming=streaming).endswith("y.csv' is empty: it holds no text")


@pytest.mark.parametrize("streaming", HOW)
def test_of_a_folder_the_damaged_file_is_named(tmp_path, streaming):
    for name in "abc":
        _lines(tmp_path / f"{name}.jsonl", [{"text": name}] * 3)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{")
    assert f"{str(tmp_path / 'b.jsonl')!r}, line 4 cannot be read as json: " in _error(tmp_path, streaming=streaming)


def test_files_with_other_columns(tmp_path):
    _lines(tmp_path / "a.jsonl", [{"text": "a"}])
    _lines(tmp_path / "b.jsonl", [{"title": "b"}])
    error = _error(tmp_path)
    assert error.startswith(f"dataset: {str(tmp_path)!r} cannot be read as json: the files, or parts of one, differ in")
    assert error.endswith(f"{str(tmp_path / 'b.jsonl')!r} has title; those before it have text")
    rows = ", row 1 has columns title; those of the first rows are text"
    assert _error(tmp_path, streaming="on") == f"dataset: {str(tmp_path / 'b.jsonl')!r}{rows}"
