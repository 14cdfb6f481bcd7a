"""Checks that what the assistant wrote is learned, by looking at the texts only, not at how they were cut.

The first check is made once per shape of conversation. It replaces every value by a unique word: each word of the
assistant must be in what is learned, and no word of anyone else. The second check is made for each row: its own words must
be in what is learned, as a template may change some values and not others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from sbft.data.turns import REASONING, THOUGHT_ENDS, Chat, Message

Shape = tuple[Any, ...]
_TEXT, _REASONING = "text", "reasoning"
_REASONING_WITHIN = (
    "Remove it from the data, or put it into the content (<think>...</think>) if the model should write it there."
)
_NO_TOOLS = "Use a tokenizer whose chat template does, or set data.tools to a column that does not exist."


class Text(NamedTuple):
    """The texts of some examples: what is learned, and the rest."""

    learned: str
    context: str


class Loss(NamedTuple):
    """Something that a template does not render, or renders where it does not belong."""

    rank: int
    """The higher, the more was rendered correctly."""
    what: str
    """Continues the sentence "The tokenizer's chat template ..."."""
    advice: str = "Remove it from the data, or use a tokenizer whose chat template renders it."


class Part(NamedTuple):
    """A value of a message, and its name in an error message."""

    name: str
    value: str


def shape_of(chat: Chat) -> Shape:
    """What decides how a template renders a conversation: its roles and which values it has, but not their text."""
    turns = [
        (
            message["role"],
            bool(message["content"].strip()),
            THOUGHT_ENDS in message["content"],
            REASONING[0] in message,
            tuple(_kind(call) for call in message.get("tool_calls", ())),
            tuple(sorted(message)),
        )
        for message in chat.messages
    ]
    return (tuple(turns), chat.learned, chat.tools is not None)


def with_words(chat: Chat) -> Chat:
    """A conversation of the same shape, in which each value is a word that occurs nowhere else."""
    words = (f"qz{number}zq" for number in range(1_000_000))
    return replace(chat, messages=[_in_words(message, words) for message in chat.messages])


def not_covered(chat: Chat, text: Text) -> Loss | None:
    """The first value of a `with_words` chat that is lost, or learned although it is someone else's; else None."""
    for place, message in enumerate(chat.messages):
        learned, role = place in chat.learned, message["role"]
        shown = not chat.learned or place < chat.learned[-1]  # what follows the last answer may be cut off
        for name, word in _parts(message):
            if not word:
                continue
            if learned and word not in text.learned:
                advice = [_REASONING_WITHIN] if name == _REASONING else []
                return Loss(1, f"leaves out the {name} of the assistant's turn", *advice)
            if learned and name in (_TEXT, _REASONING) and text.learned.count(word) > 1:
                return Loss(0, f"writes the {name} of one turn of the assistant into another of its turns")
            if not learned and word in text.learned:
                return Loss(0, f"has the {name} of a turn of the role {role!r} within the assistant's")
            if role != "assistant" and shown and word not in text.context:
                return Loss(0, f"leaves out the {name} of a turn of the role {role!r}")
    names = [str(tool.get("function", tool)["name"]) for tool in chat.tools or ()]
    if any(name not in text.context for name in names):
        return Loss(2, "does not show the model the tools that it may call", _NO_TOOLS)
    return None


def missing_words(message: Message, learned: str) -> Part | None:
    """The first value of a turn that is missing from what is learned; None if all are there."""
    for part in _parts(message):
        value = part.value.strip()
        if value and value not in learned and not any(written in learned for written in _as_json(value)):
            return part
    return None


def _parts(message: Message) -> Iterator[Part]:
    before, ends, behind = message["content"].rpartition(THOUGHT_ENDS)
    if ends:
        yield Part(_REASONING, before.rpartition("<think>")[2].strip())
    yield Part(_TEXT, behind.strip())
    if REASONING[0] in message:
        yield Part(_REASONING, message[REASONING[0]])
    for call in message.get("tool_calls", ()):
        yield Part("tool call's name", call["function"]["name"])
        yield from _arguments(call["function"]["arguments"])


def _arguments(value: Any) -> Iterator[Part]:
    """Yields the texts in a call's arguments, but no numbers: each template writes those in its own way."""
    if isinstance(value, str):
        yield Part("tool call's arguments", value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield Part("tool call's arguments", str(key))
            yield from _arguments(item)
    elif isinstance(value, list):
        for item in value:
            yield from _arguments(item)


def _as_json(value: str) -> Iterator[str]:
    for ascii_only in (False, True):
        escaped = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield escaped
        yield json.dumps(escaped, ensure_ascii=ascii_only)[1:-1]  # for templates that write the arguments as JSON text


def _kind(call: Message) -> str:
    return type(call["function"]["arguments"]).__name__


def _in_words(message: Message, words: Iterator[str]) -> Message:
    worded = dict(message)
    thoughts = THOUGHT_ENDS in message["content"]
    if message["content"].strip():
        worded["content"] = f"<think>\n{next(words)}\n{THOUGHT_ENDS}\n\n{next(words)}" if thoughts else next(words)
    if REASONING[0] in message:
        worded |= dict.fromkeys(REASONING, next(words))
    if "tool_calls" in message:
        worded["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": next(words),
                    "arguments": {next(words): next(words)} if _kind(call) == "dict" else next(words),
                },
            }
            for call in message["tool_calls"]
        ]
    return worded
