"""Conversations as text: the chat template filled in, and where in it the answers are.

A template may mark its answers itself (``{% generation %}``, see transformers). Where it does not, it is filled in
again and again: with the messages before an answer and the generation prompt, which is what the model sees before it
answers, and with the answer. Both must be how the whole conversation begins; what lies between is the answer, up to its
last special token, which ends the turn. (What follows, as the newline of ChatML, no model is asked for.)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_fast.base.chats import Conversation, PromptedText
from cascade_fast.input_checks import InputError, one_line, shown
from cascade_fast.settings import RunSettings

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]
# Templates that write today's date would make other tokens every day: theirs is always the one that Llama 3 has when
# it is given none.
_DATE = {
    "%d": "26", "%e": "26", "%m": "07", "%b": "Jul", "%B": "July", "%Y": "2024", "%y": "24", "%a": "Fri",
    "%A": "Friday", "%j": "208", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{value}')" for code, value in _DATE.items())
    + " }}{%- endmacro %}\n"
)


@dataclass(frozen=True)
class RenderedText:
    """A text with its answers.

    Attributes:
        answers: (begin, end) in characters, in order.
        all_learnt: the rest of it is learnt, too.
        sentinel: a character that has been put into strings that only look like special tokens; None: there are none.
        plain: no chat template wrote it; the tokenizer's own BOS and EOS belong to it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    all_learnt: bool = False
    sentinel: str | None = None
    plain: bool = False

    def cleaned(self, text: str) -> str:
        """``text``, a part of this one, without the sentinel."""
        if self.sentinel is None:
            return text
        return text.replace(self.sentinel, "").replace(_escaped(self.sentinel), "")


def prompted_text(chat: PromptedText, settings: RunSettings) -> RenderedText:
    """A prompt and its completion, which is the answer, as they are.

    Raises:
        InputError: there is a chat template for them.
    """
    if settings.chat_template is not None:
        raise InputError(
            f"prompt and completion are texts, for which there is no chat_template {shown(settings.chat_template)}"
        )
    text = chat.prompt + chat.completion
    return RenderedText(text, ((len(chat.prompt), len(text)),), settings.loss_on == "all", plain=True)


class ChatTemplate:
    """The base's chat template, or that of ``settings.chat_template``.

    Args:
        special: matches the string of any special token. Where messages hold one it is text: a sentinel is put into it,
            a character that the conversation does not have.
        unbreakable: special tokens for which that cannot be done.

    Raises:
        InputError: there is no template, or it cannot be read or is no Jinja.
    """

    def __init__(
        self, tokenizer: Any, settings: RunSettings, special: re.Pattern[str], unbreakable: frozenset[str]
    ) -> None:
        self.learns_answers = settings.loss_on == "assistant"
        self._special, self._unbreakable = special, unbreakable
        self._variables = tokenizer.special_tokens_map
        if settings.chat_template is not None:
            self.name = f"chat_template: {shown(settings.chat_template)}"
            text = _read(self.name, settings.chat_template)
            self._texts = {False: text, True: text}  # without tools, and with
        else:
            self.name = "the base's chat template"
            self._texts = {uses_tools: _own(tokenizer, settings, uses_tools) for uses_tools in (False, True)}
        self._texts = {key: (_FIXED_DATE if "strftime_now" in text else "") + text for key, text in self._texts.items()}
        for text in set(self._texts.values()):
            _check_syntax(self.name, text)

    def render(self, conversation: Conversation) -> RenderedText:
        """A conversation as text.

        Raises:
            InputError: the template refuses it, or does not tell where its answers are.
        """
        messages, tools = conversation.messages, conversation.tools
        strings = "\0".join(_strings([messages, tools]))
        sentinel = None
        if self._special.search(strings):
            sentinel = self._sentinel(strings)
            messages, tools = self._broken(messages, sentinel), self._broken(tools, sentinel)
        if not self.learns_answers:
            return RenderedText(self._filled(messages, tools)[0], (), True, sentinel)
        if _MARKS.search(self._texts[tools is not None]):
            text, answers = self._filled(messages, tools, marks=True)
            if conversation.learnt_from:
                prompt = self._filled(messages[: conversation.learnt_from], tools, marks=True)
                answers = answers[len(prompt[1]) :]
            return RenderedText(text, tuple(answer for answer in answers if answer[0] < answer[1]), sentinel=sentinel)
        text = self._filled(messages, tools)[0]
        numbers = range(conversation.learnt_from, len(messages))
        found = [self._answer(text, messages, tools, n) for n in numbers if messages[n]["role"] == "assistant"]
        return RenderedText(text, tuple(found), sentinel=sentinel)

    def _answer(self, text: str, messages: list[dict[str, Any]], tools: Any, number: int) -> tuple[int, int]:
        """(begin, end) of the answer that message ``number`` is."""
        lost = (
            f"message {number + 1} is an answer that cannot be found: {self.name} writes the turns up to it in another "
            "way than at the beginning of the whole conversation; use --loss-on all, or a --chat-template with "
            "{% generation %} marks"
        )
        try:
            before = self._filled(messages[:number], tools, prompt=True)[0]
            after = text if number + 1 == len(messages) else self._filled(messages[: number + 1], tools)[0]
        except InputError as error:
            raise InputError(f"{lost} ({error})") from error
        if not (text.startswith(after) and after.startswith(before)):
            raise InputError(lost)
        ends = [match.end() for match in self._special.finditer(text, len(before), len(after))]
        return len(before), ends[-1] if ends else len(after)

    def _filled(
        self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and what it marks. ``prompt``: with the generation prompt."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            filled: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._texts[tools is not None],
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # whatever a template raises or stumbles over
            raise InputError(f"{self.name} cannot write this conversation: {one_line(error)}") from error
        texts, marked = filled
        return texts[0], marked[0] if marks else []

    def _sentinel(self, strings: str) -> str:
        for match in self._special.finditer(strings):
            if match[0] in self._unbreakable:
                raise InputError(f"a message holds {shown(match[0])}, which the tokenizer cannot read as text")
        return next(c for c in _PRIVATE_USE if c not in strings and _escaped(c) not in strings)

    def _broken(self, value: Any, sentinel: str) -> Any:
        """``value`` with the sentinel in every string of a special token."""
        if isinstance(value, str):
            text, again = value, ""
            while text != again:  # one special token may begin within another
                again, text = text, self._special.sub(lambda match: match[0][0] + sentinel + match[0][1:], text)
            return text
        if isinstance(value, dict):
            return {self._broken(key, sentinel): self._broken(one, sentinel) for key, one in value.items()}
        return [self._broken(one, sentinel) for one in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _escaped(character: str) -> str:
    """As ``tojson`` writes it where a template asks for ASCII."""
    return f"\\u{ord(character):04x}"


def chat_template_of(settings: RunSettings, tokenizer: Any) -> str:
    """The template that conversations without tools are written in. Raises InputError as :class:`ChatTemplate`."""
    if settings.chat_template is not None:
        return _read(f"chat_template: {shown(settings.chat_template)}", settings.chat_template)
    return _own(tokenizer, settings, False)


def _read(where: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} cannot be read: byte {error.object[error.start]:#04x} is not UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def _own(tokenizer: Any, settings: RunSettings, uses_tools: bool) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"dataset: {shown(settings.dataset)} holds conversations, but the base {shown(settings.base)} has no chat "
            "template; give one with --chat-template"
        )
    try:
        return str(tokenizer.get_chat_template(tools=[] if uses_tools else None))
    except ValueError as error:  # several templates, none of them the default
        raise InputError(f"chat_template: not given, and the base's: {one_line(error)}") from error


def _check_syntax(where: str, text: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # compiles it
    except jinja2.TemplateSyntaxError as error:
        line = error.lineno - text.startswith(_FIXED_DATE)
        raise InputError(f"{where}, line {line}: no Jinja template: {one_line(error)}") from error
    except ImportError as error:  # a jinja2 that transformers finds too old
        raise InputError(f"{where} cannot be used: {one_line(error)}") from error
