"""The forms in which chat templates expect messages. They are tried in turn until one loses nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from sbft.data.turns import REASONING, Message

_THOUGHTS = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)


def thoughts_apart(messages: list[Message]) -> list[Message]:
    """Moves thoughts at the start of a content to their own key, which each template writes in its model's format."""
    return [_thinking(message) for message in messages]


def as_they_are(messages: list[Message]) -> list[Message]:
    """Leaves contents as text and arguments as objects, as most templates expect."""
    return messages


def without_empty_contents(messages: list[Message]) -> list[Message]:
    """Removes the content of turns that only call tools, as transformers does if it is None."""
    return [
        {key: value for key, value in message.items() if key != "content"} if _only_calls(message) else message
        for message in messages
    ]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """Turns the arguments of tool calls into JSON text (DeepSeek)."""
    return [_with_text(message) for message in messages]


def both(messages: list[Message]) -> list[Message]:
    """Removes empty contents and turns arguments into JSON text."""
    return without_empty_contents(arguments_as_text(messages))


def contents_in_parts(messages: list[Message]) -> list[Message]:
    """Turns contents into lists of parts (vision models)."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


FORMS: tuple[Callable[[list[Message]], list[Message]], ...] = (
    thoughts_apart,
    as_they_are,
    without_empty_contents,
    arguments_as_text,
    both,
    contents_in_parts,
)


def _thinking(message: Message) -> Message:
    thoughts = _THOUGHTS.match(message["content"]) if message["role"] == "assistant" else None
    if not thoughts or REASONING[0] in message:
        return message
    return {**message, **dict.fromkeys(REASONING, thoughts[1]), "content": message["content"][thoughts.end() :]}


def _only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _with_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}
