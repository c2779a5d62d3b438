"""The texts of a dataset as token ids: the row's columns, a template filled in, its conversation, or CPython's manual.

What a row is, is decided once, by what is asked for (``text_columns``, a template) and else by the columns: a
conversation, a prompt and a completion, or a plain text, of which every token is learnt.
"""

import contextlib
import dataclasses
import datetime
import numbers
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, TypeVar

from cascade_fast.base.chat_template import ChatTemplate, RenderedText, prompted_text
from cascade_fast.base.chat_tokens import ChatTokenizer
from cascade_fast.base.chats import LAYOUTS, Conversation, PromptedText, chat_layout, read_chat
from cascade_fast.base.rows import Rows, load_rows, order_of
from cascade_fast.base.sequences import Sequences, TokenText
from cascade_fast.base.splits import FEW_TEXTS, SplitSequences, one_split, split_texts
from cascade_fast.input_checks import InputError, shown, template_parts
from cascade_fast.settings import RunSettings

T = TypeVar("T")
# What these settings name is in one dataset; they are not carried over to another.
OF_ONE_DATASET = ("text_columns", "text_template", "prompt_template", "completion_template", "encoding", "streaming")
_DEFAULT_COLUMNS = (("text",), ("instruction", "input", "output"))
_TEXTS_AT_ONCE = 64
_PART_CHARACTERS = 2**17  # of a long text
_PART_END = re.compile(r"(?<=[^\W_])(?=\s)")  # after a word, before the space: there tokens end, whatever follows
_MOST_TOKENS_OF_A_CHARACTER = 4  # one for each byte of UTF-8


def load_sequences(settings: RunSettings, tokenizer: Any) -> SplitSequences:
    """Tokenises ``settings.dataset`` and cuts it into the sequences of each split.

    Raises:
        InputError: as :func:`load_token_texts`, or less text than asked.
    """
    found = load_token_texts(settings, tokenizer)
    if settings.chat_template is not None and not found.chats:
        raise InputError(
            f"chat_template: {shown(settings.chat_template)}; {shown(settings.dataset)} is read as plain texts, not as "
            "conversations"
        )
    return dataclasses.replace(split_texts(found.texts, settings, few=found.few), chats=found.chats)


def all_sequences(settings: RunSettings, tokenizer: Any, limit: int | None = None) -> Sequences:
    """All sequences of ``settings.dataset``, or the first ``limit`` in the data's own order. No splits. A chat template
    is that of a run on other text, and nothing to plain texts.

    Raises:
        InputError: as :func:`load_sequences`.
    """
    found = load_token_texts(dataclasses.replace(settings, shuffle="off"), tokenizer)
    return one_split(found.texts, settings, limit)


@dataclass(frozen=True)
class TokenTexts:
    """Texts, one after another; whether they are few (see ``splits.py``), and conversations in a chat template."""

    texts: Iterator[TokenText]
    few: bool
    chats: bool = False


def load_token_texts(settings: RunSettings, tokenizer: Any) -> TokenTexts:
    """The texts of ``settings.dataset``, shuffled if ``settings.shuffle`` says so.

    Raises:
        InputError: no such dataset or column, a file that cannot be read, a row that is not what it should be (with its
            number), or a base without a chat template.
    """
    rows = None if settings.dataset == "pydoc" else load_rows(settings)
    chats = None if rows is None else _chats(rows, settings)
    if rows is not None and chats is not None:
        tokens = ChatTokenizer(tokenizer, settings)
        begin = list(islice(chats, 1))
        rendered, few = _counted(_rendered(rows, chain(begin, chats), tokens, tokenizer, settings))
        batches = iter(lambda: list(islice(rendered, _TEXTS_AT_ONCE)), [])
        return TokenTexts(
            chain.from_iterable(tokens.encode(batch) for batch in batches),
            few,
            chats=any(isinstance(chat, Conversation) for _, chat in begin),
        )
    texts, few = _counted(load_texts(settings) if rows is None else _plain(rows, settings))
    return TokenTexts(_tokenised(texts, tokenizer), few)


def _counted(texts: Iterable[T]) -> tuple[Iterator[T], bool]:
    """The texts, and whether they are few."""
    texts = iter(texts)
    begin = list(islice(texts, FEW_TEXTS))
    return chain(begin, texts), len(begin) < FEW_TEXTS


def _tokenised(texts: Iterator[str], tokenizer: Any) -> Iterator[TokenText]:
    """Texts as tokens. A long one comes in parts, so that no more of it is tokenised than somebody reads."""

    def encode(lines: list[str], **options: Any) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(lines, verbose=False, **options)["input_ids"]
        return encoded

    # Not where a tokenizer puts something before or after every part.
    whole, begin, end = encode(["a b", "a"]) + encode([" b"], add_special_tokens=False)
    most = _PART_CHARACTERS if whole == begin + end else sys.maxsize
    for is_long, some in groupby(texts, lambda text: len(text) > most):
        if not is_long:
            while lines := list(islice(some, _TEXTS_AT_ONCE)):
                yield from map(TokenText, encode(lines))
            continue
        for text in some:
            start = 0
            while (cut := _PART_END.search(text, start + most)) is not None:
                (ids,) = encode([text[start : cut.start()]], add_special_tokens=start == 0)
                yield TokenText(ids, goes_on=True)
                start = cut.start()
            (ids,) = encode([text[start:]], add_special_tokens=start == 0)
            yield TokenText(ids)


def load_texts(settings: RunSettings) -> Iterable[str]:
    """The plain texts of ``settings.dataset``, shuffled if ``settings.shuffle`` says so.

    Raises:
        InputError: no such dataset or column, a file that cannot be read, or a row without a text.
    """
    if settings.dataset == "pydoc":
        if settings.text_columns or settings.text_template is not None or settings.prompt_template is not None:
            raise InputError("text_columns, text_template, prompt_template: pydoc has no columns; leave them out")
        if settings.streaming == "on":
            raise InputError("streaming: on; pydoc is no file")
        texts = pydoc_texts()
        return [texts[i] for i in order_of(len(texts))] if settings.shuffle == "on" else texts
    return _plain(load_rows(settings), settings)


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


def _plain(rows: Rows, settings: RunSettings) -> Iterator[str]:
    """One text a row: the template filled in, or the columns joined by newlines."""
    if settings.text_template is not None:
        parts = template_parts(settings.text_template)
        wanted = _template_columns("text_template", settings.text_template, rows)
    else:
        columns = rows.columns
        wanted = list(settings.text_columns or next((c for c in _DEFAULT_COLUMNS if set(c) <= set(columns)), ()))
        if not wanted:
            known = ", ".join(" and ".join(layout) for layout in LAYOUTS)
            raise InputError(
                f"text_columns: not given, and {shown(settings.dataset)} has columns {', '.join(columns)} (known "
                f"without being told: text; instruction, input and output; {known})"
            )
        _check_columns("text_columns", wanted, columns)
        parts = [("\n" if number else "", name) for number, name in enumerate(wanted)]
    rows = rows.select_columns(wanted)
    for number, row in rows:
        with _naming(rows, number):
            text = _filled(parts, row)
        yield text


def _chats(rows: Rows, settings: RunSettings) -> Iterator[tuple[int, Conversation | PromptedText]] | None:
    """What each row holds, with its number; None where rows are plain texts."""
    if settings.prompt_template is not None and settings.completion_template is not None:
        return _prompted(rows, settings.prompt_template, settings.completion_template)
    layout = chat_layout(rows.columns)
    if layout is None or settings.text_columns or settings.text_template is not None:
        return None
    return _read_chats(rows, layout)


def _read_chats(rows: Rows, layout: tuple[str, ...]) -> Iterator[tuple[int, Conversation | PromptedText]]:
    rows = rows.select_columns(name for name in (*layout, "system", "tools") if name in rows.columns)
    for number, row in rows:
        with _naming(rows, number):
            chat = read_chat(row, layout)
        yield number, chat


def _prompted(rows: Rows, prompt: str, completion: str) -> Iterator[tuple[int, PromptedText]]:
    """Of the two templates, filled in."""
    prompt_parts, completion_parts = template_parts(prompt), template_parts(completion)
    wanted = [name for _, name in prompt_parts if name is not None]
    _check_columns("prompt_template", wanted, rows.columns)
    wanted += _template_columns("completion_template", completion, rows)
    rows = rows.select_columns(wanted)
    for number, row in rows:
        with _naming(rows, number):
            chat = PromptedText(_filled(prompt_parts, row), _filled(completion_parts, row))
        yield number, chat


def _rendered(
    rows: Rows,
    chats: Iterator[tuple[int, Conversation | PromptedText]],
    tokens: ChatTokenizer,
    tokenizer: Any,
    settings: RunSettings,
) -> Iterator[RenderedText]:
    template: ChatTemplate | None = None
    for number, chat in chats:
        if isinstance(chat, Conversation):
            template = template or ChatTemplate(tokenizer, settings, tokens.special, tokens.unbreakable)
            with _naming(rows, number):
                text = template.render(chat)
        else:
            with _naming(rows, number):
                text = prompted_text(chat, settings)
        yield text


@contextlib.contextmanager
def _naming(rows: Rows, number: int) -> Iterator[None]:
    """Puts the file and the number of a row before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{rows.where(number)}: {error}") from error


def _template_columns(setting: str, template: str, rows: Rows) -> list[str]:
    wanted = [name for _, name in template_parts(template, setting) if name is not None]
    if not wanted:
        raise InputError(f"{setting}: {template!r}; names no column in braces; has {', '.join(rows.columns)}")
    _check_columns(setting, wanted, rows.columns)
    return wanted


def _filled(parts: list[tuple[str, str | None]], row: dict[str, Any]) -> str:
    """A template with the row's cells in it; a null beside others is an empty text.

    Raises:
        InputError: every cell is null, or one is a list or a map.
    """
    names = [name for _, name in parts if name is not None]
    if names and all(row[name] is None for name in names):
        raise InputError(f"{', '.join(names)}: null; must hold text")
    return "".join(text + ("" if name is None else _cell(name, row[name])) for text, name in parts)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, numbers.Number, datetime.date, datetime.time)):
        return str(value)
    raise InputError(f"{name}: {shown(value)}; must be text or a number")


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
