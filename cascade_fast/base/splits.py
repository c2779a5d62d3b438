"""How texts become the sequences of training, validation and test.

A text is cut into sequences of at most ``seq_len`` predictions; each begins with the last token of the one before, so
that every token but a text's first is predicted once. The tail is a sequence of its own, and so is a short text.

The splits never share a text: where one is full in the middle of a text, the rest of it is left out. Of fewer than
``FEW_TEXTS`` texts, as of one long file, that would leave too little: there the next split goes on in the same text,
after a gap of one sequence.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from cascade_fast.base.sequences import Sequences, TokenText
from cascade_fast.input_checks import ALL, InputError, shown
from cascade_fast.settings import DEFAULT_BLOCKS, GENERAL, SPLITS, RunSettings

FEW_TEXTS = 10
WARN_SHARE = 0.5

# Why tokens are left out.
TOO_SHORT = "text of fewer than 2 tokens"
SHORT_OF_A_BLOCK = "sequence shorter than a block"
UNLABELLED = "sequence without a labelled token"
REST = "rest of a text in which a split is full"
GAP = "gap between splits in one text"
NOT_NEEDED = "rest of the last text, not needed"


@dataclass
class Usage:
    """What has been read, and what became of it. ``left_out``: tokens by reason. ``whole``: whether it is all there
    is; otherwise the splits were full before."""

    texts: int = 0
    whole: bool = False
    tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    rows_without_label: int = 0
    labelled: int = 0  # of the tokens used

    @property
    def used(self) -> int:
        return self.tokens - sum(self.left_out.values())

    @property
    def used_share(self) -> float:
        return self.used / self.tokens if self.tokens else 0.0

    def leave_out(self, reason: str, tokens: int) -> None:
        if tokens:
            self.left_out[reason] = self.left_out.get(reason, 0) + tokens

    def lines(self) -> list[str]:
        """For people."""
        texts = "1 text" if self.texts == 1 else f"{self.texts:,} texts"
        more = "" if self.whole else " (the splits were full then)"
        lines = [f"{texts} read{more}, {self.tokens:,} tokens, {self.used_share:.1%} of them used"]
        if self.left_out:
            reasons = sorted(self.left_out.items(), key=lambda one: -one[1])
            lines[0] += "; left out: " + ", ".join(f"{n / self.tokens:.1%} {reason}" for reason, n in reasons)
        if self.rows_without_label:
            lines.append(f"{self.rows_without_label:,} texts have no labelled token and are left out")
        if self.tokens and self.used_share < WARN_SHARE:
            lines.append(f"warning: only {self.used_share:.1%} of the tokens read are used")
        return lines


@dataclass(frozen=True)
class SplitSequences:
    """The sequences of each split. ``source`` names the texts for reports; ``notes`` are lines for the user;
    ``chats``: whether they are conversations in a chat template; ``general``: other text, if any, that the base pass
    reads too."""

    splits: dict[str, Sequences]
    source: str
    usage: Usage
    notes: tuple[str, ...] = ()
    chats: bool = False
    general: Sequences | None = None

    @property
    def read(self) -> dict[str, Sequences]:
        """What the base pass reads: the splits, and other text."""
        return self.splits if self.general is None else {**self.splits, GENERAL: self.general}

    def settle(self, settings: RunSettings) -> RunSettings:
        """``settings`` with the size that each split has come to: they make the same splits again."""
        unit = settings.unit
        sizes = {split: len(of) if unit == "blocks" else of.tokens for split, of in self.splits.items()}
        settled: dict[str, Any] = {f"{split}_{unit}": size for split, size in sizes.items()}
        return dataclasses.replace(settings, **settled)

    def fingerprint(self) -> str:
        """SHA-256 of every split's tokens, and of which are labelled."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split} ".encode() + self.splits[split].digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Piece:
    """A sequence on its way to a split. ``text``: number of its text; ``tokens``: what it accounts for."""

    ids: np.ndarray
    labelled: np.ndarray | None
    text: int
    tokens: int

    @property
    def length(self) -> int:
        return len(self.ids) - 1

    def has_labels(self) -> bool:
        return self.labelled is None or bool(self.labelled.any())


def _cut(ids: np.ndarray, labelled: np.ndarray | None, number: int, seq_len: int, *, begun: bool) -> Iterator[_Piece]:
    """``begun``: whether the first of ``ids`` has been accounted for, by a sequence before."""
    for start in range(0, len(ids) - 1, seq_len):
        part = slice(start, start + seq_len + 1)
        marks = None if labelled is None else labelled[part][1:]
        # The first token of a text is predicted by nobody; its first sequence accounts for it.
        yield _Piece(ids[part], marks, number, len(ids[part]) - (begun or start > 0))


class _Reader:
    """Cuts texts as they are read and counts what cannot be used whatever the splits are.

    Args:
        few: whether there are fewer than ``FEW_TEXTS``; None: looks.
    """

    def __init__(self, texts: Iterable[TokenText], settings: RunSettings, few: bool | None = None) -> None:
        self.settings, self.usage, self.longest = settings, Usage(), 0
        self._texts = iter(texts)
        if few is None:
            begin = list(islice(self._texts, FEW_TEXTS))
            few = len(begin) < FEW_TEXTS
            self._texts = chain(begin, self._texts)
        self.few = few
        # Of a text of which parts have been read: tokens that are in no sequence yet, and how many it has so far.
        self._rest, self._length = np.empty(0, np.int32), 0

    def __iter__(self) -> Iterator[list[_Piece]]:
        """The sequences of each text, or of a part of one."""
        usage, seq_len = self.usage, self.settings.seq_len
        some = False  # of the text so far: whether any of it is labelled
        for text in self._texts:
            ids = np.concatenate([self._rest, np.asarray(text.ids, dtype=np.int32)])
            labelled = None if text.labelled is None else np.asarray(text.labelled, dtype=bool)
            begun = self._length > len(self._rest)
            self._length += len(text.ids)
            usage.tokens += len(text.ids)
            pieces = list(_cut(ids, labelled, usage.texts, seq_len, begun=begun))
            if text.goes_on:
                pieces = pieces[: (len(ids) - 1) // seq_len]  # whole ones
            kept = [piece for piece in pieces if piece.has_labels()]
            usage.leave_out(UNLABELLED, sum(p.tokens for p in pieces) - sum(p.tokens for p in kept))
            some = some or bool(kept)
            if text.goes_on:
                self._rest = ids[len(pieces) * seq_len :]
            else:
                usage.texts += 1
                usage.rows_without_label += self._length > 1 and not some
                usage.leave_out(TOO_SHORT, self._length * (self._length < 2))
                self.longest = max(self.longest, self._length)
                self._rest, self._length, some = ids[:0], 0, False
            if self.settings.unit == "blocks":
                short = [piece for piece in kept if piece.length < seq_len]
                usage.leave_out(SHORT_OF_A_BLOCK, sum(p.tokens for p in short))
                kept = [piece for piece in kept if piece.length == seq_len]
            yield kept
        usage.whole = True

    def stop(self) -> None:
        """Reading ends here: counts a text that has been read in part."""
        if self._length:
            self.usage.texts += 1
            self.usage.leave_out(NOT_NEEDED, len(self._rest) - (self._length > len(self._rest)))
        self.usage.whole = next(self._texts, None) is None


class _Filling:
    """Hands sequences to the splits in their order, until each has what it wants."""

    def __init__(self, wanted: dict[str, int], unit: str, *, share_texts: bool) -> None:
        self.wanted, self.unit, self.share_texts = wanted, unit, share_texts
        self.counts = dict.fromkeys(SPLITS, 0)
        self._at = 0  # of SPLITS
        self._last_text: int | None = None  # of the sequence placed last
        self._full_in: int | None = None  # the text in which the split before this one was full
        self._gap_made = True

    def done(self) -> bool:
        return all(self.counts[split] >= self.wanted[split] for split in SPLITS)

    def place(self, piece: _Piece) -> tuple[str | None, str]:
        """The split that takes the sequence, or None and why."""
        while self._at < len(SPLITS) and self.counts[SPLITS[self._at]] >= self.wanted[SPLITS[self._at]]:
            self._at += 1
            self._full_in, self._gap_made = self._last_text, False
        if self._at == len(SPLITS):
            return None, NOT_NEEDED
        if piece.text == self._full_in and not self.share_texts:
            return None, REST
        if piece.text == self._full_in and not self._gap_made:
            self._gap_made = True
            return None, GAP
        split = SPLITS[self._at]
        self.counts[split] += size_of(piece, self.unit)
        self._last_text = piece.text
        return split, ""


def size_of(piece: _Piece, unit: str) -> int:
    return 1 if unit == "blocks" else piece.length


def split_texts(texts: Iterable[TokenText], settings: RunSettings, *, few: bool | None = None) -> SplitSequences:
    """The sequences of each split, in the order of ``texts``; reads no further than it needs to.

    A split that is to have ``all`` gets what the others leave. Where the text has less than the defaults ask, they
    shrink. The splits are always those of a run that asked for the sizes they have come to.

    Args:
        few: whether there are fewer than ``FEW_TEXTS``; None: the first ones are looked at.

    Raises:
        InputError: fewer tokens or blocks than asked, or a split that would be empty.
    """
    reader, unit = _Reader(texts, settings, few), settings.unit
    wanted, pieces = _first_wanted(settings), list[_Piece]()
    filling = _Filling(wanted, unit, share_texts=reader.few)
    for kept in reader:
        pieces += kept
        for piece in kept:
            filling.place(piece)
        if filling.done():
            reader.stop()
            break
    notes: list[str] = []
    if not filling.done() or ALL in (settings.size(split) for split in SPLITS):
        if not pieces:
            raise _nothing(settings, reader)
        wanted = _wanted_of(pieces, settings, share_texts=reader.few)
    filling = _Filling(wanted, unit, share_texts=reader.few)
    taken: dict[str, list[_Piece]] = {split: [] for split in SPLITS}
    for piece in pieces:
        split, reason = filling.place(piece)
        if split is None:
            reader.usage.leave_out(reason, piece.tokens)
        else:
            taken[split].append(piece)
    _check_counts(filling.counts, wanted, pieces, settings, reader)
    usage = reader.usage
    splits = {split: _sequences(of) for split, of in taken.items()}
    usage.labelled = sum(of.labels for of in splits.values())
    if reader.few and GAP in usage.left_out:
        notes.append(
            f"{usage.texts} text{'s' * (usage.texts > 1)}: the splits are contiguous parts, training first, with "
            f"{settings.seq_len} tokens left out between them"
        )
    defaults = [split for split in ("train", "val") if settings.size(split) is None]
    if any(filling.counts[split] < _first_wanted(settings)[split] for split in defaults):
        sizes = ", ".join(f"{filling.counts[split]:,} {split}" for split in SPLITS)
        notes.append(f"the text has fewer {unit} than the defaults: {sizes}")
    return SplitSequences(splits, settings.dataset, usage, tuple(notes))


def one_split(
    texts: Iterable[TokenText], settings: RunSettings, limit: int | None = None, *, tokens: int | None = None
) -> Sequences:
    """All sequences of ``texts``, the first ``limit``, or as many as hold ``tokens`` tokens. No splits.

    Raises:
        InputError: there is none.
    """
    reader, pieces, held = _Reader(texts, settings), list[_Piece](), 0
    for piece in chain.from_iterable(reader):
        pieces.append(piece)
        held += piece.length
        if len(pieces) == limit or (tokens is not None and held >= tokens):
            break
    if not pieces:
        raise _nothing(settings, reader)
    return _sequences(pieces)


def _sequences(pieces: list[_Piece]) -> Sequences:
    marks = [np.ones(p.length, dtype=bool) if p.labelled is None else p.labelled for p in pieces]
    return Sequences.from_lists([piece.ids for piece in pieces], marks)


def _first_wanted(settings: RunSettings) -> dict[str, int]:
    """What each split wants of a text that has enough; of one that is to have all, more than any has."""
    wanted = {}
    for split in SPLITS:
        size = settings.size(split)
        if size is None:
            size = settings.expected_tokens(split) // (settings.seq_len if settings.unit == "blocks" else 1)
        wanted[split] = sys.maxsize if size == ALL else size
    return wanted


def _wanted_of(pieces: list[_Piece], settings: RunSettings, *, share_texts: bool) -> dict[str, int]:
    """What each split gets of a text that is read to its end: what is asked for by number; defaults shrink."""
    wanted, sizes = _first_wanted(settings), [size_of(piece, settings.unit) for piece in pieces]
    total = sum(sizes)
    share = total // (2 + DEFAULT_BLOCKS["train"] // DEFAULT_BLOCKS["val"])  # of validation, and of test
    if settings.size("val") is None:
        wanted["val"] = max(1, min(wanted["val"], share))
    if settings.size("test") is None:
        wanted["test"] = min(wanted["val"], max(1, share)) if settings.size("train") is None else wanted["val"]
    if settings.size("train") in (None, ALL):
        left = _left(pieces, sizes, wanted, share_texts=share_texts)
        if left["train"] == 0 and settings.size("test") is None:  # too few texts for three splits
            left = _left(pieces, sizes, {**wanted, "test": 0}, share_texts=share_texts)
        wanted = {**left, "train": min(wanted["train"], left["train"])}
    return wanted


def _left(pieces: list[_Piece], sizes: list[int], wanted: dict[str, int], *, share_texts: bool) -> dict[str, int]:
    """What each split has once the end of the text has given ``test`` and ``val`` what they want, in whole sequences:
    the rest is training's."""
    first, has = len(pieces), dict.fromkeys(SPLITS, 0)
    for split in ("test", "val"):
        while has[split] < wanted[split] and first > 0:
            first -= 1
            has[split] += sizes[first]
        if has[split] == 0:
            continue
        if share_texts:
            first -= first > 0 and pieces[first - 1].text == pieces[first].text  # the gap
        else:
            while first > 0 and pieces[first - 1].text == pieces[first].text:
                first -= 1
    return {**has, "train": sum(sizes[:first])}


def _check_counts(
    counts: dict[str, int], wanted: dict[str, int], pieces: list[_Piece], settings: RunSettings, reader: _Reader
) -> None:
    """Raises InputError where a split has less than was asked, or nothing."""
    unit = settings.unit
    required = ["train", "val"] if settings.size("test") in (None, ALL) else list(SPLITS)
    explicit = [split for split in required if settings.size(split) not in (None, ALL)]
    missing = any(counts[split] < wanted[split] for split in explicit)
    empty = [split for split in ("train", "val") if counts[split] == 0]
    if settings.size("test") == ALL and counts["test"] == 0:
        empty.append("test")
    if not missing and not empty:
        return
    has = sum(size_of(piece, unit) for piece in pieces)
    found = f"{shown(settings.dataset)} has {has:,} {unit}" + (f" of {settings.seq_len} tokens" * (unit == "blocks"))
    shared = f"{settings.seq_len} tokens are left out between the splits"
    rule = shared if reader.few else "no text is shared by two splits"
    if missing:
        asked = " + ".join(f"{wanted[split]:,} {split}" for split in explicit)
        names = ", ".join(f"{split}_{unit}" for split in SPLITS)
        raise InputError(f"{names}: {asked} asked, but {found} ({rule})")
    sizes = ", ".join(f"{split} {counts[split]:,}" for split in SPLITS)
    raise InputError(
        f"{empty[0]}_{unit}: the split would be empty: {found} in {reader.usage.texts:,} text(s) ({sizes}; {rule})"
    )


def _nothing(settings: RunSettings, reader: _Reader) -> InputError:
    """Why no text gives a sequence."""
    usage = reader.usage
    if usage.rows_without_label:
        return InputError(
            f"dataset: {shown(settings.dataset)}: no token has a label: no row has an assistant's turn or a completion "
            "that is not empty"
        )
    if settings.unit == "blocks":
        return InputError(
            f"dataset: {shown(settings.dataset)}: every text is shorter than one block of seq_len + 1 = "
            f"{settings.seq_len + 1} tokens (the longest has {reader.longest}); lower seq_len, or count in tokens "
            "(--train-tokens)"
        )
    return InputError(
        f"dataset: {shown(settings.dataset)}: no text has two tokens (texts: {usage.texts}, the longest has "
        f"{reader.longest})"
    )
