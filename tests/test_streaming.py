"""Streams: the same rows as without, read no further than needed, in memory that does not grow with the data."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
from conftest import byte_tokenizer

from cascade_fast.base.rows import load_rows, order_of, shuffled_stream
from cascade_fast.base.texts import load_sequences
from cascade_fast.input_checks import InputError
from cascade_fast.settings import make_settings
from cascade_fast.train import build_parser

ROWS = [{"text": f"row {i:04d}", "n": i, "note": None if i % 7 else "x"} for i in range(300)]


def _load(dataset, **settings):
    return load_rows(make_settings({"dataset": str(dataset), "streaming": "on", **settings}))


def _numbers(rows):
    return [number for number, _ in rows]


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _write(path, rows):
    import pandas

    if path.suffix == ".jsonl":
        _lines(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path, row_group_size=40)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_stream_has_the_rows_of_the_files(tmp_path, kind):
    _write(tmp_path / f"a.{kind}", ROWS[:200])
    _write(tmp_path / f"b.{kind}", ROWS[200:])
    for shuffle in ("off", "on"):  # the buffer holds all of them: the order is that of no stream
        stream = _load(tmp_path, shuffle=shuffle)
        assert stream.columns == ["text", "n", "note"]
        assert list(stream) == list(_load(tmp_path, shuffle=shuffle, streaming="off"))
    assert list(_load(tmp_path, shuffle="off")) == list(enumerate(ROWS, 1))


def test_text_files_are_shuffled_as_without_a_stream(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(str(number))
    rows = list(_load(tmp_path, shuffle_buffer=2))
    assert rows == list(_load(tmp_path, streaming="off"))
    assert _numbers(rows) == (order_of(20) + 1).tolist()


def test_a_small_buffer_mixes_near_rows_and_always_in_the_same_way(tmp_path):
    file = _lines(tmp_path / "x.jsonl", ROWS)
    rows = list(_load(file, shuffle_buffer=20))
    assert rows == list(_load(file, shuffle_buffer=20, seed=5))
    assert sorted(_numbers(rows)) == list(range(1, 301))
    assert all(row["n"] == number - 1 for number, row in rows)
    assert all(number <= place + 20 for place, number in enumerate(_numbers(rows), 1))
    assert _numbers(rows)[:6] == list(islice(shuffled_stream(range(1, 301), 20), 6)) == [13, 16, 1, 4, 24, 8]
    assert _numbers(rows) != _numbers(_load(file, shuffle_buffer=30))


def test_what_lies_behind_is_not_read(tmp_path):
    """A damaged line, and a byte that is not UTF-8, are met only by who reads that far."""
    file = _lines(tmp_path / "x.jsonl", ROWS * 200)
    with file.open("ab") as end:
        end.write(b"{damaged\n" + b" " * 2**20)
    asked = {"dataset": str(file), "streaming": "on", "train_tokens": 2000, "val_tokens": 100, "seq_len": 16}
    found = load_sequences(make_settings(asked), byte_tokenizer())
    assert found.usage.texts < 1000
    with pytest.raises(InputError, match=r"x.jsonl', line 60001 cannot be read as json: Expecting property name"):
        list(_load(file))

    (tmp_path / "y.csv").write_bytes(b"text\n" + b"12345678\n" * 200_000 + b"caf\xe9\n")
    assert len(list(islice(_load(tmp_path / "y.csv"), 1000))) == 1000
    with pytest.raises(InputError, match=r"y.csv', line 200002: byte 0xe9 is not UTF-8; save the file as UTF-8, or"):
        list(_load(tmp_path / "y.csv"))
    (tmp_path / "y.txt").write_bytes(b"12345678\n" * 200_000 + b"caf\xe9\n")
    with pytest.raises(InputError, match=r"y.txt', line 200001: byte 0xe9 is not UTF-8"):
        list(_load(tmp_path / "y.txt"))


def test_of_a_folder_only_the_files_that_are_needed_are_read(tmp_path):
    _lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    assert len(list(islice(_load(tmp_path, shuffle_buffer=100), 200))) == 200
    with pytest.raises(InputError, match=r"b.jsonl', line 1: byte 0xff is not UTF-8"):
        list(_load(tmp_path))


def test_files_with_other_columns(tmp_path):
    _write(tmp_path / "a.csv", ROWS[:3])
    _write(tmp_path / "b.csv", [{"text": "a"}])
    with pytest.raises(InputError, match=r"b.csv', row 1 has columns text; those of the first rows are text, n, note"):
        list(_load(tmp_path))
    # In JSON a row may have more or fewer.
    file = _lines(tmp_path / "x.jsonl", [*ROWS[:150], {"text": "b"}, {"text": "c", "tools": []}, {}, {"title": "d"}])
    rows = list(islice(_load(file, shuffle="off"), 150, 153))
    assert [number for number, _ in rows] == [151, 152, 153]
    assert rows[0][1] == {"text": "b", "n": None, "note": None}
    assert rows[2][1]["text"] is None
    with pytest.raises(InputError, match=r"x.jsonl', row 154 has columns title; those of the first rows are text, n"):
        list(_load(file))


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset, whose connection is lost after some rows."""
    read = []

    def rows(lost_after):
        for row in ROWS:
            if row["n"] == lost_after:
                raise ConnectionError("the connection\nis lost")
            read.append(row["n"])
            yield row

    def load_dataset(name, **options):
        assert (name, options["split"]) == ("someone/some-data", "train")
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"lost_after": 200})
        return stream if options["streaming"] else datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read


def test_a_dataset_of_the_hub(hub):
    rows = _load("someone/some-data", shuffle_buffer=10)
    assert rows.columns == ["text", "n", "note"]
    found = list(islice(rows, 50))
    assert all(row == ROWS[number - 1] for number, row in found)
    assert max(hub) < 100
    assert rows.where(7) == "dataset: 'someone/some-data', row 7"
    assert list(islice(_load("someone/some-data", shuffle="off").select_columns(["n"]), 2)) == [
        (1, {"n": 0}),
        (2, {"n": 1}),
    ]
    assert len(list(_load("someone/some-data", streaming="off"))) == len(ROWS)


def test_a_lost_connection_is_said_in_one_line(hub):
    with pytest.raises(InputError) as raised:
        list(_load("someone/some-data"))
    assert str(raised.value) == "dataset: 'someone/some-data' cannot be read after 200 rows: the connection is lost"


# --- memory ----------------------------------------------------------------------------------------------------------

_PEAK = 'print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])'
ALL_ROWS = f"""
import re, sys
from cascade_fast.base.rows import load_rows
from cascade_fast.settings import make_settings
assert sum(1 for _ in load_rows(make_settings({{"dataset": sys.argv[1], "streaming": "on"}}))) == int(sys.argv[2])
{_PEAK}
"""
SOME_TOKENS = f"""
import re, sys
from conftest import byte_tokenizer
from cascade_fast.base.texts import load_sequences
from cascade_fast.settings import make_settings
settings = make_settings({{"dataset": sys.argv[1], "streaming": "on", "train_tokens": 100_000}})
assert load_sequences(settings, byte_tokenizer()).usage.texts < int(sys.argv[2])
{_PEAK}
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize(
    ("program", "most"),
    [(ALL_ROWS, 30_000), pytest.param(SOME_TOKENS, 200_000, marks=pytest.mark.slow)],
    ids=["all rows", "some tokens"],
)
def test_memory_does_not_grow_with_the_data(tmp_path, program, most):
    peaks = []
    for count in (most // 10, most):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as lines:
            lines.writelines(f'{{"text": "{i:06d} {"word " * 200}"}}\n' for i in range(count))
        command = [sys.executable, "-c", program, str(file), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        peaks.append(int(done.stdout))
        print(f"{count} rows, {file.stat().st_size >> 20} MB: {peaks[-1] >> 10} MB")
    assert peaks[1] < 1.05 * peaks[0]


# --- settings --------------------------------------------------------------------------------------------------------


def test_streaming_is_a_switch(tmp_path):
    for flags, value in (
        ([], None),
        (["--streaming"], "on"),
        (["--streaming", "on"], "on"),
        (["--streaming=off"], "off"),
    ):
        found = vars(build_parser().parse_args([*flags, "--dataset", "x.jsonl"]))
        assert found.get("streaming") == value
        assert found["dataset"] == "x.jsonl"
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--streaming", "yes"])
    for written, value in (("on", "on"), ("true", "on"), ("off", "off"), ("false", "off")):
        (tmp_path / "x.yaml").write_text(f"streaming: {written}\n")
        assert make_settings({}, str(tmp_path / "x.yaml")).streaming == value


def test_pydoc_is_no_stream():
    with pytest.raises(InputError, match="streaming: on; pydoc is no file"):
        load_sequences(make_settings({"streaming": "on"}), byte_tokenizer())
