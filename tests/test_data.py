"""Texts to blocks: the cut, the splits, every kind of file, and what is refused."""

import csv
import json

import pytest
from conftest import byte_tokenizer

from cascade_fast.config import ConfigError, make_config
from cascade_fast.data import cut_blocks, load_blocks, pydoc_texts

TOKENIZER = byte_tokenizer()


def _config(**settings):
    defaults = {"seq_len": 8, "train_blocks": 2, "val_blocks": 1, "test_blocks": 1, "shuffle": "off"}
    return make_config({**defaults, **settings})


def _texts(*lengths):
    """Texts of given lengths; the character says which text it is."""
    return ["abcdefgh"[i] * n for i, n in enumerate(lengths)]


def _owners(ids):
    """Which text each block came from."""
    return ["".join(sorted(set(TOKENIZER.decode(row)))) for row in ids]


def test_blocks_overlap_by_the_label_and_the_tail_is_dropped():
    text = "0123456789abcdefghijklmnopq"  # 27 tokens: blocks at 0, 8, 16; 24 has only 3 left
    config = _config(train_blocks=3, test_blocks=0)
    ids = cut_blocks([text, "x" * 9], TOKENIZER, config).ids
    assert [TOKENIZER.decode(row) for row in ids["train"]] == [text[0:9], text[8:17], text[16:25]]
    assert [TOKENIZER.decode(row) for row in ids["val"]] == ["x" * 9]
    assert ids["test"].shape == (0, 9)


def test_a_text_of_exactly_one_block_counts_and_one_token_less_does_not():
    config = _config(train_blocks=1, test_blocks=0)
    ids = cut_blocks(_texts(8, 9, 8, 9), TOKENIZER, config).ids
    assert _owners(ids["train"]) == ["b"]
    assert _owners(ids["val"]) == ["d"]


def test_no_text_is_shared_between_splits():
    # a: 3 blocks, of which training takes 2; the third belongs to no split.
    ids = cut_blocks(_texts(25, 17, 9), TOKENIZER, _config()).ids
    assert [_owners(ids[s]) for s in ("train", "val", "test")] == [["a", "a"], ["b"], ["c"]]


def test_test_blocks_default_to_as_many_as_validation_or_what_is_left():
    config = make_config({"seq_len": 8, "train_blocks": 1, "val_blocks": 2})
    assert len(cut_blocks(_texts(9, 17, 17, 9), TOKENIZER, config).ids["test"]) == 2
    assert len(cut_blocks(_texts(9, 17, 9), TOKENIZER, config).ids["test"]) == 1
    assert len(cut_blocks(_texts(9, 17), TOKENIZER, config).ids["test"]) == 0


def test_reading_stops_when_there_is_enough():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "z" * 9

    cut_blocks(endless(), TOKENIZER, _config())
    assert len(read) < 200


def test_too_few_blocks_says_how_many_there_are():
    with pytest.raises(ConfigError, match=r"2 train \+ 1 val \+ 1 test blocks asked, but 'pydoc' has 3 of 8 tokens"):
        cut_blocks(_texts(17, 9), TOKENIZER, _config())


def test_texts_too_short_for_one_block():
    with pytest.raises(ConfigError, match=r"shorter than one block of seq_len \+ 1 = 9 tokens \(the longest has 8\)"):
        cut_blocks(_texts(8, 3), TOKENIZER, _config())


def test_the_fingerprint_tells_blocks_apart():
    one, same, other = (cut_blocks(_texts(25, 17, 9 + i), TOKENIZER, _config()).fingerprint() for i in (0, 0, 8))
    assert one == same
    three = cut_blocks(["q" * 25, "b" * 17, "c" * 9], TOKENIZER, _config()).fingerprint()
    assert three != one
    assert other == one  # what is beyond the blocks asked for changes nothing


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
    blocks = load_blocks(_config(dataset=str(path), train_blocks=1), TOKENIZER)
    # instruction, input and output by themselves: the columns of an Alpaca row
    assert TOKENIZER.decode(blocks.ids["train"][0]) == "aaaa\n\naaa"
    columns = load_blocks(_config(dataset=str(path), train_blocks=1, text_columns=["output", "n"]), TOKENIZER)
    assert TOKENIZER.decode(columns.ids["val"][0]) == "bbbbbbbbb"
    template = load_blocks(_config(dataset=str(path), train_blocks=1, text_template="<{n}> {output}"), TOKENIZER)
    assert TOKENIZER.decode(template.ids["test"][0]) == "<7> ccccc"


def test_text_files_are_a_text_each_and_a_folder_is_read_in_order(tmp_path):
    for name in "cba":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 9)
    blocks = load_blocks(_config(dataset=str(tmp_path), train_blocks=1), TOKENIZER)
    decoded = [TOKENIZER.decode(blocks.ids[s][0]) for s in ("train", "val", "test")]
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
        ({"text_template": "{output"}, "text_template: "),
    ],
)
def test_columns_that_are_not_there(tmp_path, settings, said):
    path = tmp_path / "rows.json"
    _write(path, "json")
    with pytest.raises(ConfigError, match=said):
        load_blocks(_config(dataset=str(path), **settings), TOKENIZER)


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
        with pytest.raises(ConfigError, match=said):
            load_blocks(_config(dataset=name), TOKENIZER)
    with pytest.raises(ConfigError, match="pydoc has no columns"):
        load_blocks(_config(dataset="pydoc", text_columns=["a"]), TOKENIZER)


def test_pydoc_quotes_nothing_twice():
    texts = pydoc_texts()
    assert sum(map(len, texts)) > 300_000
    paragraphs = [p.strip() for text in texts for p in text.split("\n\n") if len(p.strip()) >= 40]
    assert len(paragraphs) == len(set(paragraphs))
