"""Texts of every kind of file, in which order, and what is refused."""

import csv
import json

import pytest
from conftest import byte_tokenizer

from cascade_fast.base.texts import all_sequences, load_sequences, load_texts, pydoc_texts
from cascade_fast.input_checks import InputError
from cascade_fast.settings import make_settings

TOKENIZER = byte_tokenizer()


def _config(**settings):
    defaults = {"seq_len": 8, "train_blocks": 2, "val_blocks": 1, "test_blocks": 1, "shuffle": "off"}
    return make_settings({**defaults, **settings})


def _owners(ids):
    """Which text each block came from."""
    return ["".join(sorted(set(TOKENIZER.decode(row)))) for row in ids]


ROWS = [{"instruction": c * 4, "input": "", "output": c * 20, "n": 7} for c in "abcd"]


def _write(path, kind):
    if kind in ("json", "jsonl"):
        text = json.dumps(ROWS) if kind == "json" else "".join(json.dumps(r) + "\n" for r in ROWS)
        path.write_text(text)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_table(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    _write(path, kind)
    blocks = load_sequences(_config(dataset=str(path), train_blocks=1), TOKENIZER)
    # instruction, input and output by themselves: the columns of an Alpaca row
    assert TOKENIZER.decode(blocks.splits["train"].ids(0)) == "aaaa\n\naaa"
    columns = load_sequences(_config(dataset=str(path), train_blocks=1, text_columns=["output", "n"]), TOKENIZER)
    assert TOKENIZER.decode(columns.splits["val"].ids(0)) == "bbbbbbbbb"
    template = load_sequences(_config(dataset=str(path), train_blocks=1, text_template="<{n}> {output}"), TOKENIZER)
    assert TOKENIZER.decode(template.splits["test"].ids(0)) == "<7> ccccc"


def test_text_files_are_a_text_each_and_a_folder_is_read_in_order(tmp_path):
    for name in "cba":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 9)
    blocks = load_sequences(_config(dataset=str(tmp_path), train_blocks=1), TOKENIZER)
    decoded = [TOKENIZER.decode(blocks.splits[s].ids(0)) for s in ("train", "val", "test")]
    assert [text[0] for text in decoded] == ["a", "b", "c"]
    assert decoded[0] == "a\na\na\na\na"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"text_columns": ["absent"]},
            "text_columns: 'absent'; the dataset's columns are instruction, input, output, n",
        ),
        ({"text_template": "{absent}"}, "text_template: 'absent'; the dataset's columns"),
        ({"text_template": "no column"}, "names no column"),
    ],
)
def test_columns_that_are_not_there(tmp_path, settings, said):
    path = tmp_path / "rows.json"
    _write(path, "json")
    with pytest.raises(InputError, match=said):
        load_sequences(_config(dataset=str(path), **settings), TOKENIZER)


def test_datasets_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.csv").write_text("b")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "picture.png").write_text("")
    (tmp_path / "unknown.csv").write_text("x,y\n1,2\n")
    for name, said in {
        str(tmp_path / "absent.json"): "no such file or folder",
        "absent.jsonl": "no such file or folder",
        str(tmp_path / "empty"): "the folder holds no file of",
        str(tmp_path / "mixed"): "mixes kinds of files",
        str(tmp_path / "broken.json"): "cannot be read as json",
        str(tmp_path / "picture.png"): "must be a file of",
        str(tmp_path / "unknown.csv"): "text_columns: not given",
        "someone/some-dataset": "not to be had from the Hugging Face Hub",
    }.items():
        with pytest.raises(InputError, match=said):
            load_sequences(_config(dataset=name), TOKENIZER)
    with pytest.raises(InputError, match="pydoc has no columns"):
        load_sequences(_config(dataset="pydoc", text_columns=["a"]), TOKENIZER)


# --- the file that was named is the file that is read ----------------------------------------------------------------

NAMES = [
    "data[1]", "a*b", "a**b", "**", "*", "what?", "x[!a]", "[]]", "[[]x]", "train-[a-z]", "a{b}", "~x", "%41", "a#b",
    "a:b", "zip:", "file:x", ".hidden", "__special__", "two words", "new\nline", "a,b", "quote's", "back\\slash",
    "caf\xe9",
]  # fmt: skip


def _one(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": text}) + "\n")


def _read(dataset):
    return list(load_texts(make_settings({"dataset": str(dataset), "shuffle": "off"})))


def test_names_with_signs_of_patterns_are_names(tmp_path, monkeypatch):
    for decoy in ("data1", "aXb", "whatx", "xb", "x]", "train-q", "A", "abc"):
        _one(tmp_path / f"{decoy}.jsonl", "decoy")
        _one(tmp_path / decoy / "in.jsonl", "decoy")
    for name in NAMES:
        _one(tmp_path / f"{name}.jsonl", name)
        _one(tmp_path / name / "in[0].jsonl", f"in {name}")
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        assert _read(tmp_path / f"{name}.jsonl") == _read(f"{name}.jsonl") == [name]
        assert _read(tmp_path / name) == _read(f"{name}/in[0].jsonl") == [f"in {name}"]


def test_names_that_nothing_escapes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "elsewhere")
    for name in ("a::b", "zip:::x", "$WHERE"):
        _one(tmp_path / f"{name}.jsonl", "x")
        with pytest.raises(InputError, match=r"a path with '::' or a variable in it cannot be read: rename it"):
            _read(tmp_path / f"{name}.jsonl")
    _one(tmp_path / "$NOWHERE.jsonl", "x")
    assert _read(tmp_path / "$NOWHERE.jsonl") == ["x"]


@pytest.mark.parametrize(
    "name", ["json", "imagefolder", "", "https://host/x", "s3://bucket/x", "zip://x::y", "a/b/c", "~", "a b"]
)
def test_what_is_no_name_reads_nothing_of_the_current_folder(tmp_path, monkeypatch, name):
    _one(tmp_path / "x.json", "decoy")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder, and no name of a dataset on the hub"):
        _read(name)


def test_a_folder_s_hidden_and_empty_files_are_left_out(tmp_path):
    _one(tmp_path / "a.jsonl", "a")
    _one(tmp_path / ".ipynb_checkpoints" / "a.jsonl", "copy")
    _one(tmp_path / "sub" / ".b.jsonl", "copy")
    _one(tmp_path / "sub" / "c.jsonl", "c")
    (tmp_path / "b.jsonl").write_text("")
    assert _read(tmp_path) == ["a", "c"]


# --- damaged files, in words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", b"", " is empty: it holds no text"),
        ("x.jsonl", b"\n\n", " is empty: it holds no text"),
        ("x.csv", b"", " is empty: it holds no text"),
        ("x.csv", b"text,b\n", " is empty: it holds no text"),
        ("x.txt", b"", " is empty: it holds no text"),
        ("x.parquet", b"", " is empty: it holds no text"),
        ("x.json", b"[]", " is empty: it holds no text"),
        ("x.json", b"null", "; must hold JSON objects"),  # the reader would die of it
        ("x.json", b" [\nnull, {}]", "; must hold JSON objects"),
        ("x.json", b"[1, 2]", "; must hold JSON objects"),
        ("x.jsonl", b'{"text": "a"}\nnull\n', ", line 2: null; must hold JSON objects"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            ", line 2: byte 0xe9 is not UTF-8; save the file as UTF-8",
        ),
        ("x.csv", b"text\ncaf\xe9\n", ", line 2: byte 0xe9 is not UTF-8"),
        ("x.txt", b"caf\xe9", ", line 1: byte 0xe9 is not UTF-8"),
        ("x.csv", "text\nx\n".encode("utf-16"), ", line 1: byte 0xff is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b', ", line 2 cannot be read as json: Unterminated string"),
        ("x.csv", b"text,b\n1,2\n1,2,3,4\n", " cannot be read as csv: Error tokenizing data."),
        ("x.parquet", b"PAR1xxxxPAR1", " cannot be read as parquet: Parquet file size is 12 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_said_in_one_line(tmp_path, capfd, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        _read(file)
    assert str(raised.value).startswith(f"dataset: {str(file)!r}{said}")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_folder_whose_files_differ(tmp_path):
    _one(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").write_text('{"title": "b"}\n')
    with pytest.raises(InputError, match="cannot be read as json: the files, or parts of one, differ in their columns"):
        _read(tmp_path)


def test_marks_at_the_start_of_a_file_and_lists_over_many_lines(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert _read(tmp_path / "x.jsonl") == ["a"]
    (tmp_path / "x.json").write_text(json.dumps([{"text": "", "n": [None, 1]}, {"text": "b", "n": []}], indent=1))
    assert _read(tmp_path / "x.json") == ["", "b"]


# --- shuffle and all -------------------------------------------------------------------------------------------------


@pytest.fixture
def sorted_data(tmp_path):
    """200 texts, the first half of a, the others of z."""
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(json.dumps({"text": ("a" if i < 100 else "z") * 9}) + "\n" for i in range(200)))
    return path


def test_shuffled_splits_of_sorted_data_are_alike(sorted_data):
    asked = {"dataset": str(sorted_data), "train_blocks": 100, "val_blocks": 50, "test_blocks": 50}
    shares = {
        how: [
            _owners(of.blocks()).count("z") / len(of)
            for of in load_sequences(_config(**asked, shuffle=how), TOKENIZER).splits.values()
        ]
        for how in ("on", "off")
    }
    assert shares["off"] == [0.0, 1.0, 1.0]
    assert all(0.35 < share < 0.65 for share in shares["on"])


def test_the_order_is_fixed_and_not_the_seed_s(sorted_data):
    texts = [f"{i:04d}" for i in range(200)]
    sorted_data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one, two = (
        list(load_texts(make_settings({"dataset": str(sorted_data), "seed": seed}))) for seed in (1, 2)
    )  # fmt: skip
    assert one == two != texts
    assert sorted(one) == texts
    assert one[:6] == ["0018", "0170", "0107", "0098", "0177", "0182"]  # of numpy's frozen generator, in every release
    pydoc = pydoc_texts()
    shuffled = load_texts(make_settings({}))
    assert shuffled != pydoc
    assert sorted(shuffled) == sorted(pydoc)
    in_order = all_sequences(make_settings({"dataset": str(sorted_data), "seq_len": 2}), TOKENIZER, limit=3)
    assert [TOKENIZER.decode(in_order.ids(n)) for n in range(3)] == ["000", "000", "00"]  # as it stands


def test_pydoc_quotes_nothing_twice():
    texts = pydoc_texts()
    assert sum(map(len, texts)) > 300_000
    paragraphs = [p.strip() for text in texts for p in text.split("\n\n") if len(p.strip()) >= 40]
    assert len(paragraphs) == len(set(paragraphs))
