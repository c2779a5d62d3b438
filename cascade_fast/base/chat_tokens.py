"""Rendered conversations as tokens, with labels on the answers: exactly what the model reads and writes when it serves.

A text is cut where an answer begins, and at its special tokens, as the tokenizer itself does it. Each piece is encoded
by itself, so that

- the tokens before an answer are those of its prompt alone, which is all that inference has; an answer that begins with
  whitespace never merges into its prompt;
- the tokens after that cut are those of the answer: there is no token to divide;
- a special token's string in a message is text: only what the template writes becomes the special token.

Where an answer ends without a special token, a token that goes beyond its end is context.

Added tokens that are not special (as ``<think>`` or ``<tool_call>`` of Qwen) are the tokenizer's business: they are
one token wherever they stand.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cascade_fast.base.chat_template import RenderedText
from cascade_fast.base.sequences import TokenText
from cascade_fast.input_checks import InputError, shown
from cascade_fast.settings import RunSettings

# SentencePiece puts a space before a text. A piece from the middle of one is encoded after a character that merges with
# nothing, whose tokens are then taken away.
_GUARD = "\x01"
_PROBES = ("word", " word", "\nword", "  word")


class _Piece(NamedTuple):
    text: str
    special: int | None  # id of the special token that it is
    guarded: bool
    answer: int  # leading characters that belong to an answer


class ChatTokenizer:
    """Makes tokens of conversations, and of prompts with completions.

    Attributes:
        special: matches the string of any special token.
        unbreakable: special tokens that the tokenizer makes of their strings even where these are to be text.

    Raises:
        InputError: a slow tokenizer.
    """

    def __init__(self, tokenizer: Any, settings: RunSettings) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"base: {shown(settings.base)}; its tokenizer is not a fast one (it has no tokenizer.json), which "
                "conversations and completions need"
            )
        self._tokenizer, self._settings = tokenizer, settings
        special = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids = {content: id for content, (id, _) in special.items()}
        longest_first = sorted(self._ids, key=lambda content: -len(content))
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Some take the spaces beside them, too.
        self._takes_left = {content for content, (_, token) in special.items() if token.lstrip}
        self._takes_right = {content for content, (_, token) in special.items() if token.rstrip}
        self._guard_ids = self._encode([_GUARD])[0]
        self._guarded_within, self._guarded_after = False, dict.fromkeys(self._ids, False)
        self._choose_guards()
        as_text = zip(self._ids, self._encode(list(self._ids)), strict=True)
        self.unbreakable = frozenset(one for one, its in as_text if len(one) == 1 or self._ids[one] in its)
        self._bos = self._leading_ids()

    def encode(self, texts: Sequence[RenderedText]) -> list[TokenText]:
        """Their tokens, and which of them are learnt.

        Raises:
            InputError: a special token that the tokenizer does not find wherever it stands.
        """
        pieces = [list(self._pieces(text)) for text in texts]
        keys: dict[tuple[bool, str], None] = {}  # each string once: headers of turns are in all conversations
        for piece in (piece for row in pieces for piece in row if piece.special is None):
            keys[piece.guarded, piece.text] = None
            if 0 < piece.answer < len(piece.text):
                keys[piece.guarded, piece.text[: piece.answer]] = None
        encoded = self._encode([_GUARD * guarded + text for guarded, text in keys])
        ids = {key: self._unguarded(key[0], its) for key, its in zip(keys, encoded, strict=True)}
        return [self._joined(text, its, ids) for text, its in zip(texts, pieces, strict=True)]

    def _pieces(self, rendered: RenderedText) -> Iterator[_Piece]:
        text = rendered.text
        cuts = [begin for begin, _ in rendered.answers] + [len(text)]
        ends = [0] + [end for _, end in rendered.answers]
        guarded = False  # at the beginning of the text
        for first, last, labelled_to in zip([0, *cuts], cuts, ends, strict=False):
            at = first
            for match in [*self.special.finditer(text, first, last), None]:
                start, end = (last, last) if match is None else self._with_spaces(match, at, last)
                if piece := rendered.cleaned(text[at:start]):
                    answer = rendered.cleaned(text[at : max(at, min(start, labelled_to))])
                    yield _Piece(piece, None, guarded, len(answer))
                    guarded = self._guarded_within
                at = end
                if match is not None:
                    token = match[0]
                    if token not in self._guarded_after:
                        raise InputError(
                            f"base: {shown(self._settings.base)}; its tokenizer does not find the special token "
                            f"{shown(token)} wherever it stands"
                        )
                    yield _Piece(token, self._ids[token], False, len(token) * (match.end() <= labelled_to))
                    guarded = self._guarded_after[token]

    def _with_spaces(self, match: re.Match[str], first: int, last: int) -> tuple[int, int]:
        """(start, end) of a special token with the spaces that it takes."""
        start, end = match.span()
        while match[0] in self._takes_left and start > first and match.string[start - 1].isspace():
            start -= 1
        while match[0] in self._takes_right and end < last and match.string[end].isspace():
            end += 1
        return start, end

    def _joined(
        self, rendered: RenderedText, pieces: list[_Piece], ids: dict[tuple[bool, str], list[int]]
    ) -> TokenText:
        tokens: list[int] = list(self._bos) if rendered.plain else []
        labelled = [False] * len(tokens)
        for piece in pieces:
            its = [piece.special] if piece.special is not None else ids[piece.guarded, piece.text]
            learnt = len(its) if piece.answer else 0
            if 0 < piece.answer < len(piece.text):  # a token that goes beyond the answer is context
                learnt = _common(its, ids[piece.guarded, piece.text[: piece.answer]])
            tokens += its
            labelled += [True] * learnt + [False] * (len(its) - learnt)
        eos = self._tokenizer.eos_token_id
        if rendered.plain and eos is not None and tokens[-1:] != [eos]:
            tokens.append(eos)
            labelled.append(True)
        return TokenText(tokens, None if rendered.all_learnt else labelled)

    def _encode(self, texts: list[str], *, split_special: bool = True) -> list[list[int]]:
        """Without BOS and the like. ``split_special``: strings of special tokens are text."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found: list[list[int]] = self._tokenizer(texts, split_special_tokens=split_special, **options)["input_ids"]
        return found

    def _unguarded(self, guarded: bool, ids: list[int]) -> list[int]:
        if not guarded:
            return ids
        count = len(self._guard_ids)
        if ids[:count] != self._guard_ids:
            raise InputError(f"base: {shown(self._settings.base)}; its tokenizer cannot encode a part of a text")
        return ids[count:]

    def _choose_guards(self) -> None:
        """Finds out whether a piece within a text, and one after each special token, is to be guarded, so that the
        pieces of a text make what the tokenizer makes of it as a whole.

        A special token is left out if neither does so.
        """
        cut = [RenderedText("word\n" + word, ((5, 5 + len(word)),)) for word in _PROBES[:2]]
        if not all(self._as_wholes(cut)):
            self._guarded_within = True
            self._guarded_within = all(self._as_wholes(cut))
        probes = [RenderedText(f"word{token}{word}", ()) for token in self._ids for word in _PROBES]
        found: dict[str, bool] = {}
        for guarded in (True, False):  # without a guard where both do
            self._guarded_after = dict.fromkeys(self._ids, guarded)
            same = self._as_wholes(probes)
            each = [same[i : i + len(_PROBES)] for i in range(0, len(same), len(_PROBES))]
            found |= {token: guarded for token, its in zip(self._ids, each, strict=True) if all(its)}
        self._guarded_after = found

    def _as_wholes(self, texts: list[RenderedText]) -> list[bool]:
        """Of each, whether its pieces make what the tokenizer makes of it as a whole."""
        try:
            pieces = self.encode(texts)
        except InputError:
            return [False] * len(texts)
        wholes = self._encode([text.text for text in texts], split_special=False)
        return [list(its.ids) == whole for its, whole in zip(pieces, wholes, strict=True)]

    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        with_it, bare = self._tokenizer("word")["input_ids"], self._encode(["word"])[0]
        return next((with_it[:n] for n in range(len(with_it)) if with_it[n : n + len(bare)] == bare), [])


def _common(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
