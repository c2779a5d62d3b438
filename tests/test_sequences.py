"""Texts to sequences: the cut, the splits, what is left out and said, and that sizes make the same splits again."""

import dataclasses

import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cascade_fast.base import splits as module
from cascade_fast.base.sequences import NO_LABEL, Sequences, TokenText
from cascade_fast.base.splits import one_split, split_texts
from cascade_fast.input_checks import ALL, InputError
from cascade_fast.settings import SPLITS, make_settings

TOKENIZER = byte_tokenizer()


@pytest.fixture
def many_texts(monkeypatch):
    """A handful of texts stands for many: none is shared by splits."""
    monkeypatch.setattr(module, "FEW_TEXTS", 0)


def _config(**changes):
    return make_settings({"seq_len": 8, "train_blocks": 2, "val_blocks": 1, "test_blocks": 1, **changes})


def _tokens(**changes):
    return make_settings({"seq_len": 8, **changes})


def split(texts, asked):
    return split_texts((TokenText(TOKENIZER(t)["input_ids"]) if isinstance(t, str) else t for t in texts), asked)


def _texts(*lengths):
    """Texts of given lengths; the character says which text it is."""
    return ["abcdefghijklmnopqrstuvw"[i] * n for i, n in enumerate(lengths)]


def _owners(ids):
    """Which text each block came from."""
    return ["".join(sorted(set(TOKENIZER.decode(row)))) for row in ids]


def _parts(of):
    return [TOKENIZER.decode(of.ids(n)) for n in range(len(of))]


TEXT = "0123456789abcdefghijklmnopq"  # 27 tokens: sequences at 0, 8, 16; the one at 24 is short


def test_blocks_overlap_by_the_label_and_the_tail_is_left_out(many_texts):
    found = split([TEXT, "x" * 9], _config(train_blocks=3, test_blocks=0))
    assert _parts(found.splits["train"]) == [TEXT[0:9], TEXT[8:17], TEXT[16:25]]
    assert _parts(found.splits["val"]) == ["x" * 9]
    assert len(found.splits["test"]) == 0
    assert found.usage.left_out == {module.SHORT_OF_A_BLOCK: 2}


def test_in_tokens_the_tail_and_short_texts_are_sequences(many_texts):
    found = split([TEXT, "ab", "c", "", "x" * 9, "y" * 4], _tokens(train_tokens=27, val_tokens=8, test_tokens=3))
    assert _parts(found.splits["train"]) == [TEXT[0:9], TEXT[8:17], TEXT[16:25], TEXT[24:], "ab"]
    assert found.splits["train"].length_B.tolist() == [8, 8, 8, 2, 1]
    assert [_parts(found.splits[s]) for s in ("val", "test")] == [["x" * 9], ["y" * 4]]
    usage = found.usage
    assert (usage.texts, usage.tokens, usage.used, usage.left_out) == (6, 43, 42, {module.TOO_SHORT: 1})
    assert usage.lines() == ["6 texts read, 43 tokens, 97.7% of them used; left out: 2.3% text of fewer than 2 tokens"]


def test_the_longest_come_first_and_equal_ones_in_the_data_s_order(many_texts):
    found = split(_texts(3, 9, 5, 9, 3, 20), _tokens(train_tokens=20, val_tokens=1, test_tokens=1)).splits["train"]
    assert _parts(found) == ["b" * 9, "d" * 9, "c" * 5, "a" * 3]
    assert found.rank_B.tolist() == [1, 3, 2, 0]
    assert _parts(found.first(2)) == ["b" * 9, "a" * 3]  # the first two of the data
    assert found.first(None) is found


def test_padded_rectangles_hold_each_sequence_and_nothing_else():
    found = Sequences.from_lists([[1, 2, 3], [4, 5, 6, 7], [8, 9]], [[True, False], [False, True, True], [True]])
    padded = found.padded(slice(0, 3))
    assert padded.input_BS.tolist() == [[4, 5, 6], [1, 2, 3], [8, 9, 0]]
    assert padded.ids_BT.tolist() == [[4, 5, 6, 7], [1, 2, 3, 0], [8, 9, 0, 0]]
    assert padded.real_BS.sum(1).tolist() == [3, 2, 1]
    assert padded.label_BS.tolist() == [[NO_LABEL, 6, 7], [2, NO_LABEL, NO_LABEL], [9, NO_LABEL, NO_LABEL]]
    assert (found.tokens, found.labels) == (6, 4)
    assert [found.labelled(n).tolist() for n in range(3)] == [[False, True, True], [True, False], [True]]
    assert [(s.start, s.stop) for s in found.batches(6)] == [(0, 2), (2, 3)]
    assert [(s.start, s.stop) for s in found.batches(100, equal=True)] == [(0, 1), (1, 2), (2, 3)]


def test_a_text_of_exactly_one_block_counts_and_one_token_less_does_not(many_texts):
    config = _config(train_blocks=1, test_blocks=0)
    splits = split(_texts(8, 9, 8, 9), config).splits
    assert _owners(splits["train"].blocks()) == ["b"]
    assert _owners(splits["val"].blocks()) == ["d"]


def test_no_text_is_shared_between_splits(many_texts):
    # a: 3 blocks, of which training takes 2; the third belongs to no split.
    found = split(_texts(25, 17, 9), _config())
    assert [_owners(found.splits[s].blocks()) for s in SPLITS] == [["a", "a"], ["b"], ["c"]]
    assert found.usage.left_out == {module.REST: 16}  # of a and of b


def test_test_blocks_default_to_as_many_as_validation_or_what_is_left(many_texts):
    settings = make_settings({"seq_len": 8, "train_blocks": 1, "val_blocks": 2})
    assert len(split(_texts(9, 17, 17, 9), settings).splits["test"].blocks()) == 2
    assert len(split(_texts(9, 17, 9), settings).splits["test"].blocks()) == 1
    assert len(split(_texts(9, 17), settings).splits["test"].blocks()) == 0


def test_reading_stops_when_there_is_enough():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "z" * 9

    split(endless(), _config())
    assert len(read) < 200


def test_too_few_blocks_says_how_many_there_are(many_texts):
    with pytest.raises(InputError, match=r"2 train \+ 1 val \+ 1 test asked, but 'pydoc' has 3 blocks of 8 tokens"):
        split(_texts(17, 9), _config())


def test_texts_too_short_for_one_block(many_texts):
    with pytest.raises(InputError, match=r"shorter than one block of seq_len \+ 1 = 9 tokens \(the longest has 8\)"):
        split(_texts(8, 3), _config())


def test_the_fingerprint_tells_blocks_apart(many_texts):
    one, same, other = (split(_texts(25, 17, 9 + i), _config()).fingerprint() for i in (0, 0, 8))
    assert one == same
    three = split(["q" * 25, "b" * 17, "c" * 9], _config()).fingerprint()
    assert three != one
    assert other == one  # what is beyond the blocks asked for changes nothing


def test_all_to_train_on_is_what_validation_and_test_leave(many_texts):
    texts = _texts(25, 17, 9, 25, 17)  # 3, 2, 1, 3, 2 blocks
    for val, test, train in ((1, 2, 6), (3, 0, 6), (4, 2, 5), (2, 4, 3), (1, 1, 6)):
        asked = _config(train_blocks="all", val_blocks=val, test_blocks=test)
        blocks = split(texts, asked)
        counts = [len(ids) for ids in blocks.splits.values()]
        assert counts == [train, val, test]
        settled = blocks.settle(asked)
        assert settled.train_blocks == counts[0]
        again = split(texts, settled)
        assert again.fingerprint() == blocks.fingerprint()
        owners = [set(_owners(of.blocks())) for of in blocks.splits.values()]
        assert not owners[0] & (owners[1] | owners[2])
    default = split(texts, make_settings({"seq_len": 8, "train_blocks": "all", "val_blocks": 2}))
    assert [len(ids) for ids in default.splits.values()] == [6, 2, 2]


def test_all_to_test_on_is_what_is_left(many_texts):
    asked = _config(train_blocks=3, val_blocks=1, test_blocks="all")
    blocks = split(_texts(25, 17, 9, 25), asked)
    assert [len(ids) for ids in blocks.splits.values()] == [3, 1, 4]
    assert (asked.test_blocks, blocks.settle(asked).test_blocks) == (ALL, 4)
    with pytest.raises(InputError, match="test_blocks: the split would be empty: 'pydoc' has 5 blocks"):
        split(_texts(25, 17), asked)
    with pytest.raises(InputError, match="train_blocks: the split would be empty: 'pydoc' has 3 blocks of 8 tokens"):
        split(_texts(17, 9), _config(train_blocks="all"))
    with pytest.raises(InputError, match="shorter than one block"):
        split(_texts(3), _config(train_blocks="all"))


# --- what is asked, and what comes of it -----------------------------------------------------------------------------


def test_the_default_shrinks_to_what_there_is_and_says_so(many_texts):
    found = split(_texts(*[20] * 21), _tokens())
    sizes = {name: of.tokens for name, of in found.splits.items()}
    assert sizes == {"train": 15 * 19, "val": 3 * 19, "test": 3 * 19}  # five to one to one
    assert found.notes == ("the text has fewer tokens than the defaults: 285 train, 57 val, 57 test",)
    assert found.usage.left_out == {}
    two = split(_texts(20, 20), _tokens())
    assert [of.tokens for of in two.splits.values()] == [19, 16, 0]
    with pytest.raises(InputError, match=r"train_tokens: the split would be empty: 'pydoc' has 19 tokens in 1 text"):
        split(_texts(20), _tokens())


def test_a_default_takes_no_more_than_it_asks(many_texts):
    found = split(("q" * 9 for _ in range(10_000)), _tokens())
    assert [of.tokens for of in found.splits.values()] == [320 * 8, 64 * 8, 64 * 8]
    assert (found.notes, found.usage.texts) == ((), 448)


def test_one_text_is_split_into_parts_with_a_gap():
    text = "".join(chr(33 + i % 90) for i in range(8 * 20 + 4))
    found = split([text], _tokens(train_tokens="all", val_tokens=16, test_tokens=8))
    train, val, test = (_parts(found.splits[name]) for name in SPLITS)
    whole = [text[i : i + 9] for i in range(0, len(text) - 1, 8)]
    assert train == whole[:15]
    assert val == whole[16:18]  # the one between them is left out
    assert test == whole[19:]
    assert found.usage.left_out == {module.GAP: 16}
    assert found.notes == (
        "1 text: the splits are contiguous parts, training first, with 8 tokens left out between them",
    )
    unasked = split([text], _tokens())
    assert all(len(of) for of in unasked.splits.values())
    assert "contiguous parts" in unasked.notes[0]
    with pytest.raises(
        InputError, match=r"200 train \+ 8 val asked, but .* \(8 tokens are left out between the splits\)"
    ):
        split([text], _tokens(train_tokens=200, val_tokens=8))


def test_less_than_half_used_is_a_warning(many_texts):
    found = split(_texts(50, 9, 9), _tokens(train_tokens=8, val_tokens=8, test_tokens=8))
    assert found.usage.lines()[-1] == "warning: only 39.7% of the tokens read are used"
    assert found.usage.left_out == {module.REST: 41}


def _marked(ids, marks):
    return TokenText(ids, [mark == "x" for mark in marks])


def test_only_sequences_with_a_label_are_used(many_texts):
    texts = [
        _marked(range(20), "." * 10 + "x" * 10),  # its first sequence of eight has none
        _marked(range(5), "....."),
        _marked(range(5), "x...."),  # the first token is never predicted
        _marked(range(9), "........x"),
        TokenText(range(9)),
    ]
    found = split(texts, _tokens(train_tokens=8, val_tokens=8, test_tokens=8))
    train = found.splits["train"]
    assert [train.ids(n).tolist() for n in range(len(train))] == [list(range(8, 17))]
    assert train.labelled(0).tolist() == [False] + [True] * 7
    assert found.splits["val"].labelled_N.tolist() == [False] * 7 + [True]
    assert found.splits["test"].labels == 8
    usage = found.usage
    assert usage.rows_without_label == 2
    assert usage.left_out == {module.UNLABELLED: 9 + 5 + 5, module.REST: 3}
    assert (usage.labelled, usage.used) == (7 + 1 + 8, 8 + 9 + 9)
    with pytest.raises(InputError, match="no token has a label"):
        split(texts[1:3], _tokens())


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25),
    marks=st.integers(0, 2**30),
    train=st.one_of(st.none(), st.just("all"), st.integers(1, 200)),
    val=st.one_of(st.none(), st.integers(1, 60)),
    test=st.one_of(st.none(), st.integers(0, 60)),
    unit=st.sampled_from(["tokens", "blocks"]),
)
def test_whatever_comes_of_it_is_counted_and_makes_the_same_splits_again(lengths, marks, train, val, test, unit):
    generator = torch.Generator().manual_seed(marks)
    texts = [
        TokenText(range(1000 * i, 1000 * i + n), (torch.rand(n, generator=generator) < 0.2).tolist())
        for i, n in enumerate(lengths)
    ]
    given_sizes = {"train": train, "val": val, "test": test}
    asked = _tokens(**{f"{name}_{unit}": size for name, size in given_sizes.items() if size is not None})
    try:
        found = split_texts(texts, asked)
    except InputError:
        return
    settled = found.settle(asked)
    again = split_texts(texts, settled)
    assert again.fingerprint() == found.fingerprint()
    assert again.settle(settled) == settled
    usage = found.usage
    whole = {int(token) for of in found.splits.values() for token in of.ids_M}
    overlap = sum(int(of.ids(n)[0]) % 1000 > 0 for of in found.splits.values() for n in range(len(of)))
    ids = sum(len(of.ids_M) for of in found.splits.values())
    assert usage.used == ids - overlap  # the first token of a later sequence is accounted for by the one before
    assert usage.tokens == usage.used + sum(usage.left_out.values())
    assert usage.labelled == sum(of.labels for of in found.splits.values())
    predicted = [int(token) for of in found.splits.values() for n in range(len(of)) for token in of.ids(n)[1:]]
    assert len(predicted) == len(set(predicted))
    for of in found.splits.values():
        for n in range(len(of)):
            sequence = of.ids(n).tolist()
            assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))  # a stretch of one text
            text = texts[sequence[0] // 1000]
            assert of.labelled(n).tolist() == [text.labelled[token % 1000] for token in sequence[1:]]
    assert whole <= {token for text in texts for token in text.ids}
    if len(texts) >= module.FEW_TEXTS:
        owners = [{int(token) // 1000 for token in of.ids_M} for of in found.splits.values()]
        assert len(set.union(*owners)) == sum(map(len, owners))


def test_all_sequences_of_a_text_or_the_first():
    texts = [TokenText(range(n)) for n in (5, 20, 3)]
    found = one_split(texts, _tokens())
    assert sorted(found.length_B.tolist()) == [2, 3, 4, 8, 8]
    assert sorted(one_split(texts, _tokens(), limit=2).length_B.tolist()) == [4, 8]
    blocks = one_split(texts, dataclasses.replace(_tokens(), val_blocks=1))
    assert blocks.length_B.tolist() == [8, 8]
