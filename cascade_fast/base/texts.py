"""The texts of a dataset as token ids: the row's columns, a template filled in, or CPython's manual."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from cascade_fast.base.rows import Rows, load_rows, order_of
from cascade_fast.base.sequences import Sequences, SplitSequences, TokenText, one_split, split_texts
from cascade_fast.input_checks import InputError, shown, template_parts
from cascade_fast.settings import RunSettings

_DEFAULT_COLUMNS = (("text",), ("instruction", "input", "output"))
_TEXTS_AT_ONCE = 64
_MOST_TOKENS_OF_A_CHARACTER = 4  # one for each byte of UTF-8


def load_sequences(settings: RunSettings, tokenizer: Any) -> SplitSequences:
    """Tokenises ``settings.dataset`` and cuts it into the sequences of each split.

    Raises:
        InputError: an unknown dataset or column, or less text than asked.
    """
    return split_texts(load_token_texts(settings, tokenizer), settings)


def all_sequences(settings: RunSettings, tokenizer: Any, limit: int | None = None) -> Sequences:
    """All sequences of ``settings.dataset``, or the first ``limit`` in the data's own order. No splits.

    Raises:
        InputError: as :func:`load_sequences`.
    """
    return one_split(load_token_texts(dataclasses.replace(settings, shuffle="off"), tokenizer), settings, limit)


def load_token_texts(settings: RunSettings, tokenizer: Any) -> Iterator[TokenText]:
    """The texts of ``settings.dataset``, one after another, shuffled if ``settings.shuffle`` says so.

    Raises:
        InputError: no such dataset or column, or a file that cannot be read.
    """
    iterator = iter(load_texts(settings))
    while batch := list(islice(iterator, _TEXTS_AT_ONCE)):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            yield TokenText(ids)


def load_texts(settings: RunSettings) -> Iterable[str]:
    """The texts of ``settings.dataset``, shuffled if ``settings.shuffle`` says so.

    Raises:
        InputError: no such dataset or column, or a file that cannot be read.
    """
    if settings.dataset == "pydoc":
        if settings.text_columns or settings.text_template is not None:
            raise InputError("text_columns, text_template: pydoc has no columns; leave them out")
        if settings.streaming == "on":
            raise InputError("streaming: on; pydoc is no file")
        texts = pydoc_texts()
        return [texts[i] for i in order_of(len(texts))] if settings.shuffle == "on" else texts
    return _render(load_rows(settings), settings)


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


def _render(rows: Rows, settings: RunSettings) -> Iterator[str]:
    """One text a row: the template filled in, or the columns joined by newlines."""
    columns = rows.columns
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
    rows = rows.select_columns(wanted)
    if parts:
        return ("".join(text + ("" if name is None else _text(row[name])) for text, name in parts) for _, row in rows)
    return ("\n".join(_text(row[name]) for name in wanted) for _, row in rows)


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
