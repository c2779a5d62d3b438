"""Conversations, and prompts with completions, as rows hold them: which columns, which roles, and what is refused.

Messages about a row do not name it: who reads the rows puts that before them.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cascade_fast.input_checks import InputError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
# As LLaMA-Factory, FastChat and Axolotl read ``from``. A function_call is an assistant's turn, too.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# Which columns make a row a conversation or a prompt with its completion; the first that are all there.
LAYOUTS = (("messages",), ("conversations",), ("prompt", "completion"))


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets. ``learnt_from``: number of the first message that can be an answer to learn."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    learnt_from: int = 0


@dataclass(frozen=True)
class PromptedText:
    """A text of which the first part is only read. No chat template."""

    prompt: str
    completion: str


def chat_layout(columns: Collection[str]) -> tuple[str, ...] | None:
    """The columns of :data:`LAYOUTS` that a dataset has; None: its rows are plain texts."""
    return next((layout for layout in LAYOUTS if set(layout) <= set(columns)), None)


def read_chat(row: dict[str, Any], layout: tuple[str, ...]) -> Conversation | PromptedText:
    """What a row of ``layout`` holds.

    Raises:
        InputError: a column that is null or of another kind, an unknown role, or content that is not text.
    """
    for name in layout:
        if row.get(name) is None:
            raise InputError(
                f"{name}: null; must be given" if name in row else f"has no {name}, as rows before it have"
            )
    if len(layout) == 1:
        messages, learnt_from = _messages(layout[0], row[layout[0]]), 0
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return PromptedText(prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise InputError("prompt, completion: one is text, the other is not; must be both text or both messages")
        messages = _messages("prompt", prompt)
        learnt_from = len(messages)
        messages += _messages("completion", completion)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise InputError(f"system: {shown(system)}; must be text")
    if system:
        if messages[0]["role"] == "system":
            raise InputError(f"system: {shown(system)}; the conversation begins with a system message, too")
        messages.insert(0, {"role": "system", "content": system})
        learnt_from += learnt_from > 0
    return Conversation(messages, _tools(row.get("tools")), learnt_from)


def _messages(column: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else shown(value)
        raise InputError(f"{column}: {found}; must be a list of messages")
    return [_message(f"{column}, entry {number}", entry) for number, entry in enumerate(value, 1)]


def _message(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {shown(entry)}; must be a map with role and content")
    sharegpt = entry.get("from") is not None
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    roles = SHAREGPT_ROLES if sharegpt else {role: role for role in ROLES}
    role = entry.get(role_key)
    if role is None:
        raise InputError(f"{where}: has no role; must be a map with role and content")
    if not isinstance(role, str) or role not in roles:
        raise InputError(f"{where}: {role_key} {shown(role)}; must be one of {', '.join(roles)}")
    # What a file's reader fills in where other rows have more; templates take a missing key, not a null.
    message = {} if sharegpt else {key: _without_nulls(value) for key, value in entry.items() if value is not None}
    message["role"] = roles[role]
    content = entry.get(content_key)
    if role == "function_call":
        message["tool_calls"] = _function_calls(f"{where}: {content_key}", content)
    elif content is not None or not (roles[role] == "assistant" and message.get("tool_calls")):
        message["content"] = _content(f"{where}: {content_key}", content)
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return message


def _content(where: str, content: Any) -> str:
    """Text; of a list of text parts, all of them joined, as templates that take such lists write them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}: {'null' if content is None else shown(content)}; must be text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = (
                f"a part of type {shown(part['type'])}" if isinstance(part, dict) and "type" in part else shown(part)
            )
            raise InputError(f"{where}: {found}; must be text, or a list of parts of type 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _function_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """A ShareGPT ``function_call``: JSON of one call, or of a list of calls."""
    calls = _from_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise InputError(f"{where}: {shown(value)}; must be JSON of a function call: a map with name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _with_arguments(call: Any) -> Any:
    """Arguments as a map, as templates want them; OpenAI's files have JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _from_json(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _tools(value: Any) -> list[Any] | None:
    if not value:
        return None
    tools = _from_json(value) if isinstance(value, str) else _without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"tools: {shown(value)}; must be a list of maps, or JSON of one")
    return tools or None


def _from_json(text: Any) -> Any:
    """What ``text`` is as JSON; None if it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
