"""Texts to token blocks: ``x = block[:-1]``, ``y = block[1:]``, blocks of ``seq_len + 1`` tokens, one after another.

Training, validation and test blocks never come from the same text: where a split is full in the middle of a text,
the rest of that text is left out, so that validation does not continue what training has read.
"""

import dataclasses
import glob
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade_fast.input_checks import InputError, one_line, shown, template_parts
from cascade_fast.settings import ALL, SPLITS, RunSettings

_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_JSON_START = re.compile(rb"[\s\xef\xbb\xbf]*(\{|\[\s*[\]{]|$)")  # an object, or a list of them
_IN_WORDS = {  # what datasets says of files that cannot be read
    "StopIteration": "it holds no rows",
    "Couldn't cast": "the files, or parts of one, differ in their columns or their types",
    "must have the same columns": "the files, or parts of one, differ in their columns or their types",  # datasets 4
    "No columns to parse": "it has no header line",
}
_DEFAULT_COLUMNS = (("text",), ("instruction", "input", "output"))
_TEXTS_AT_ONCE = 64
_IDS = torch.int32
_MOST_TOKENS_OF_A_CHARACTER = 4  # one for each byte of UTF-8


@dataclass(frozen=True)
class TokenBlocks:
    """``ids``: split -> ``(blocks, seq_len + 1)`` int32. ``source`` names the texts for reports."""

    ids: dict[str, Tensor]
    source: str

    def settle(self, settings: RunSettings) -> RunSettings:
        """``settings`` with the number of blocks that ``all`` has come to."""
        counts = {"train_blocks": len(self.ids["train"]), "test_blocks": len(self.ids["test"])}
        settled: dict[str, Any] = {name: count for name, count in counts.items() if getattr(settings, name) == ALL}
        return dataclasses.replace(settings, **settled)

    def fingerprint(self) -> str:
        """SHA-256 of every split's tokens."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split} {tuple(self.ids[split].shape)}".encode())
            digest.update(self.ids[split].numpy().tobytes())
        return digest.hexdigest()


def load_blocks(settings: RunSettings, tokenizer: Any) -> TokenBlocks:
    """Tokenises ``settings.dataset`` and cuts it into the blocks of each split.

    Raises:
        InputError: an unknown dataset or column, texts too short for a block, or fewer blocks than asked.
    """
    return cut_blocks(load_texts(settings), tokenizer, settings)


def cut_blocks(texts: Iterable[str], tokenizer: Any, settings: RunSettings) -> TokenBlocks:
    """The blocks of each split, in the order of ``texts``; reads no further than it needs to. A split that is to have
    ``all`` gets what the others leave: the splits are those of a run that asked for that number."""
    want_test = settings.val_blocks if settings.test_blocks is None else settings.test_blocks
    wanted = {"train": settings.train_blocks, "val": settings.val_blocks, "test": want_test}
    longest = 0

    def read() -> Iterator[Tensor]:
        nonlocal longest
        for ids in _tokenised(texts, tokenizer):
            longest = max(longest, len(ids))
            yield _cut(ids, settings.seq_len)

    pieces: Iterable[Tensor] = read()
    if wanted["train"] == ALL:
        pieces = list(pieces)
        wanted["train"] = _left([len(piece) for piece in pieces], wanted["val"], wanted["test"], settings)
    if wanted["test"] == ALL:
        wanted["test"] = sys.maxsize
    blocks: dict[str, list[Tensor]] = {split: [torch.empty((0, settings.seq_len + 1), dtype=_IDS)] for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    splits = iter(SPLITS)
    split, found = next(splits), 0
    for piece in pieces:
        while counts[split] >= wanted[split] and split != "test":
            split = next(splits)
        if all(counts[name] >= wanted[name] for name in SPLITS):
            break
        found += len(piece)
        taken = piece[: wanted[split] - counts[split]]
        blocks[split].append(taken)
        counts[split] += len(taken)
    if found == 0:
        raise _too_short(settings, longest)
    required = ("train", "val") if settings.test_blocks in (None, ALL) else SPLITS
    if any(counts[name] < wanted[name] for name in required):
        asked = " + ".join(f"{wanted[name]} {name}" for name in required)
        raise InputError(
            f"train_blocks, val_blocks, test_blocks: {asked} blocks asked, but {shown(settings.dataset)} has {found} "
            f"of {settings.seq_len} tokens (a text is never shared between splits)"
        )
    if settings.test_blocks == ALL and counts["test"] == 0:
        raise InputError(f"test_blocks: all; {shown(settings.dataset)} has {found} blocks, train and val leave none")
    return TokenBlocks({name: torch.cat(parts) for name, parts in blocks.items()}, settings.dataset)


def _left(lengths: list[int], val: int, test: int, settings: RunSettings) -> int:
    """How many blocks are left to train on once the last texts have given ``test`` and ``val`` blocks.

    ``lengths``: blocks of each text.
    """
    first = len(lengths)
    for wanted in (test, val):
        found = 0
        while found < wanted and first > 0:
            first -= 1
            found += lengths[first]
    left = sum(lengths[:first])
    if left == 0 and sum(lengths) > 0:
        raise InputError(
            f"train_blocks: all; {shown(settings.dataset)} has {sum(lengths)} blocks of {settings.seq_len} tokens: "
            f"{val} val + {test} test leave none (a text is never shared between splits)"
        )
    return left


def _too_short(settings: RunSettings, longest: int) -> InputError:
    return InputError(
        f"dataset: {shown(settings.dataset)}: every text is shorter than one block of seq_len + 1 = "
        f"{settings.seq_len + 1} tokens (the longest has {longest}); lower seq_len"
    )


def text_blocks(settings: RunSettings, tokenizer: Any, limit: int | None = None) -> Tensor:
    """All blocks of ``settings.dataset``, or the first ``limit``, in the data's own order: ``(blocks, seq_len + 1)``
    int32. No splits.

    Raises:
        InputError: as :func:`load_blocks`.
    """
    pieces, found, longest = [], 0, 0
    for ids in _tokenised(load_texts(dataclasses.replace(settings, shuffle="off")), tokenizer):
        longest = max(longest, len(ids))
        pieces.append(_cut(ids, settings.seq_len))
        found += len(pieces[-1])
        if limit is not None and found >= limit:
            break
    if found == 0:
        raise _too_short(settings, longest)
    return torch.cat(pieces)[:limit]


def _cut(ids: list[int], seq_len: int) -> Tensor:
    """(blocks, seq_len + 1); what is left at the end of the text is dropped."""
    if len(ids) <= seq_len:
        return torch.empty((0, seq_len + 1), dtype=_IDS)
    return torch.tensor(ids, dtype=_IDS).unfold(0, seq_len + 1, seq_len)


def _tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _TEXTS_AT_ONCE)):
        yield from tokenizer(batch, verbose=False)["input_ids"]


# --- texts ----------------------------------------------------------------------------------------------------------


def load_texts(settings: RunSettings) -> Iterable[str]:
    """The texts of ``settings.dataset``, shuffled if ``settings.shuffle`` says so.

    Raises:
        InputError: no such dataset or column, or a file that cannot be read.
    """
    if settings.dataset == "pydoc":
        if settings.text_columns or settings.text_template is not None:
            raise InputError("text_columns, text_template: pydoc has no columns; leave them out")
        texts = pydoc_texts()
        return [texts[i] for i in _order(len(texts))] if settings.shuffle == "on" else texts
    return _render(_load_rows(settings.dataset), settings)


def _order(count: int) -> Any:
    """The shuffled order of ``count`` texts: always the same, so that runs of any seed have the same splits and share
    their base pass. NumPy's RandomState is frozen: other versions give the same numbers (NEP 19)."""
    return np.random.RandomState(0).permutation(count)


def pydoc_texts() -> list[str]:
    """CPython's reference manual as shipped in ``pydoc_data``, by topic.

    Some topics quote whole sections of others; a paragraph is kept where it comes first, so that no split holds
    what another one has.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for topic in topics.values():
        paragraphs = []
        for paragraph in topic.split("\n\n"):
            key = paragraph.strip()
            if key not in seen or len(key) < 40:  # short ones (headings, single words) are no quotation
                paragraphs.append(paragraph)
            seen.add(key)
        texts.append("\n\n".join(paragraphs))
    return texts


def _load_rows(dataset: str) -> Any:
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


def _render(rows: Any, settings: RunSettings) -> Iterator[str]:
    """One text a row: the template filled in, or the columns joined by newlines."""
    columns = list(rows.column_names)
    if settings.text_template is not None:
        parts = template_parts(settings.text_template)
        wanted = [name for _, name in parts if name is not None]
        if not wanted:
            raise InputError(
                f"text_template: {settings.text_template!r}; names no column in braces; has {', '.join(columns)}"
            )
        _check_columns("text_template", wanted, columns)
    else:
        parts = []
        wanted = list(settings.text_columns or next((c for c in _DEFAULT_COLUMNS if set(c) <= set(columns)), ()))
        if not wanted:
            raise InputError(f"text_columns: not given, and {shown(settings.dataset)} has columns {', '.join(columns)}")
        _check_columns("text_columns", wanted, columns)
    rows = rows.select_columns(list(dict.fromkeys(wanted)))
    if settings.shuffle == "on":
        rows = rows.select(_order(len(rows)))
    if parts:
        return ("".join(text + ("" if name is None else _text(row[name])) for text, name in parts) for row in rows)
    return ("\n".join(_text(row[name]) for name in wanted) for row in rows)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _check_columns(setting: str, wanted: Iterable[str], columns: list[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise InputError(f"{setting}: {shown(name)}; the dataset's columns are {', '.join(columns)}")


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text. Of tokens that make up a character together, the last has it, the others
    nothing."""

    def decode(first: int, last: int) -> str:
        # Those before it decide whether a token begins with a space.
        return tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    context, done = 0, 0
    for end in range(1, len(ids) + 1):
        text = decode(context, end)
        waits = text.endswith("\ufffd") and end < len(ids) and end - done < _MOST_TOKENS_OF_A_CHARACTER
        texts.append("" if waits else text[len(decode(context, done)) :])
        if not waits:
            context, done = done, end
    return texts
