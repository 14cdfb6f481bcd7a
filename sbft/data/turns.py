"""Reads conversations, as data sets write them, into the one form that chat templates get."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from sbft.errors import DataError

THOUGHT_ENDS = "</think>"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names of a turn's thoughts in data sets and templates."""
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_READ = {"role", "content", "tool_calls", "tool_call_id", *REASONING}
_LIKE = 'a list of messages such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, ready for a chat template."""

    messages: list[Message]
    """Contents are text, and arguments of tool calls are objects; a key without a value is absent."""
    learned: tuple[int, ...] = ()
    """Indices of the assistant's turns that are trained on."""
    tools: list[Any] | None = None
    """The functions that the assistant may call; None if there are none."""

    def until(self, place: int) -> Chat:
        """The conversation before the turn at `place`."""
        learned = tuple(turn for turn in self.learned if turn < place)
        return replace(self, messages=self.messages[:place], learned=learned)

    def answers(self) -> tuple[int, ...]:
        """Indices of the assistant's turns that are not empty."""
        return tuple(
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and _says_something(message)
        )

    def learning_only(self, place: int) -> Chat:
        """The same conversation, in which only the turn at `place` is learned."""
        return replace(self, learned=(place,))

    def beginning_with(self, system: str | None) -> Chat:
        """The same conversation with this system turn, unless it has one."""
        if system is None or not self.messages or self.messages[0]["role"] in ("system", "developer"):
            return self
        messages = [{"role": "system", "content": system}, *self.messages]
        return replace(self, messages=messages, learned=tuple(place + 1 for place in self.learned))


def conversation(value: Any, column: str, tools: Any = None) -> Chat:
    """Reads the messages of one row, in the form of OpenAI (role, content) or of ShareGPT (from, value).

    Tables fill the keys that an object lacks with None, which templates take for a value. So None counts as absent, at
    every depth. JSON text keeps its null values, both in the arguments of a tool call and in a whole list of tools.

    Args:
        value: the row's messages, or None.
        column: the name of their column, for error messages.
        tools: the row's tools: a list, JSON text of one, or None.

    Raises:
        DataError: a value is not of the expected type.
    """
    listed = _from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if listed is None:
        listed = []
    if not isinstance(listed, list):
        raise DataError(
            f"A value of {column!r} is a {type(listed).__name__}, {str(listed)[:60]!r}; expected {_LIKE}, which .jsonl, "
            ".json and .parquet files can hold."
        )
    messages = [_message(entry, column) for entry in listed]
    chat = Chat(messages, tools=_tools(tools))
    weighted = [_weight(entry, column) for entry in listed]
    return replace(chat, learned=tuple(place for place in chat.answers() if weighted[place]))


def question_of(value: Any) -> str:
    """The text of the turns before the first answer, except system turns; for readers, and to compare questions."""
    turns = []
    for entry in value:
        if not isinstance(entry, dict):
            break  # not a message: it is refused, with its value, when it is rendered
        message = _renamed(entry)
        if message.get("role") == "assistant":
            break
        if message.get("role") != "system":
            content = message.get("content")
            turns.append(content if isinstance(content, str) else json.dumps(content))
    return "\n".join(turns)


def holds_reasoning(message: Message) -> bool:
    """Whether an assistant's turn has thoughts, in a key of their own or in its content."""
    return bool(message.get(REASONING[0])) or THOUGHT_ENDS in str(message.get("content", ""))


def keys_not_read(value: Any, template: str) -> set[str]:
    """Keys of a row's messages that neither sbft nor the chat template reads, judging by the template's text."""
    listed = value if isinstance(value, list) else []
    entries = [entry for entry in listed if isinstance(entry, dict)]
    keys = {key for entry in entries for key, item in entry.items() if item is not None}
    if any("from" in entry for entry in entries):
        keys -= {"from", "value"}
    # A tool's answer has the tool's name beside the id of the call, and most templates need neither.
    return {key for key in keys - _READ - {"weight", "name"} if key not in template}


def _message(entry: Any, column: str) -> Message:
    message = _without_none(_renamed(entry)) if isinstance(entry, dict) else {}
    if not isinstance(message.get("role"), str):
        raise DataError(f"A value of {column!r} holds {repr(entry)[:120]}; expected {_LIKE}.")
    content = message.get("content")
    message["content"] = _text(content, column) if isinstance(content, list) else "" if content is None else content
    if not isinstance(message["content"], str):
        raise DataError(f"A message of {column!r} has the content {str(content)[:120]}; expected text.")
    message.pop("weight", None)
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    for key in REASONING:
        message.pop(key, None)
    if reasoning is not None:
        # Under every name, as each template knows only one of them.
        message |= dict.fromkeys(REASONING, reasoning)
    calls = message.pop("tool_calls", None)
    calls = _from_json(calls) if isinstance(calls, str) else calls
    if calls:
        message["tool_calls"] = [_call(call, column) for call in calls]
    return message


def _renamed(entry: Message) -> Message:
    """A message with OpenAI's keys and roles."""
    message = dict(entry)
    if "role" not in message and isinstance(message.get("from"), str):
        message["role"] = message.pop("from")
        message["content"] = message.pop("value", None)
    role = message.get("role")
    if not isinstance(role, str):
        return message
    if role == "function_call":
        calls = _from_json(message.get("content"))
        if calls is None:
            raise DataError(
                f"A turn of function_call holds {str(message.get('content'))[:120]!r}; expected JSON such as "
                '{"name": "get_weather", "arguments": {"city": "Oslo"}}.'
            )
        message["content"] = None
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    message["role"] = _ROLES.get(role, role)
    return message


def _text(parts: list[Any], column: str) -> str:
    """The text of a content that is a list of parts."""
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise DataError(
                f"A message of {column!r} holds a part of the type {part['type']!r}; expected text only. sbft reads "
                "nothing else from data files: without its picture or sound, the model would learn to answer a placeholder."
            )
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise DataError(
                f"A message of {column!r} has the content {str(parts)[:120]}; expected text, or parts such as "
                '{"type": "text", "text": "..."}.'
            )
    return "".join(part["text"] for part in parts)


def _call(call: Any, column: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"A message of {column!r} has the tool call {str(call)[:120]}; expected one such as "
            '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}.'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments)
        # Other text than an object is up to the model, such as the source text of a program.
        arguments = arguments if isinstance(arguments, dict) else function["arguments"]
    around = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    named = {key: value for key, value in function.items() if key in ("name", "arguments")}
    return {"type": "function", **around, "function": {**named, "arguments": {} if arguments is None else arguments}}


def _tools(value: Any) -> list[Message] | None:
    listed = _from_json(value) if isinstance(value, str) else _without_none(value)
    if isinstance(value, str) and not value.strip():
        return None
    listed = [listed] if isinstance(listed, dict) else listed
    if value is not None and not (isinstance(listed, list) and all(isinstance(tool, dict | str) for tool in listed)):
        raise DataError(
            f"The tools of a row are {str(value)[:120]!r}; expected a list such as "
            '[{"type": "function", "function": {"name": "get_weather", "parameters": {...}}}], or JSON text of one.'
        )
    tools = [_from_json(tool) if isinstance(tool, str) else tool for tool in listed or []]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"A row has the tool {str(tool)[:120]}; expected an object with a name.")
        if isinstance(function.get("parameters"), str):
            function["parameters"] = _from_json(function["parameters"])
    return tools or None


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get(REASONING[0]))


def _weight(entry: Message, column: str) -> bool:
    weight = entry.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(
            f"A message of {column!r} has the weight {str(weight)[:20]}; expected 1, or 0 for a turn that is not learned."
        )
    return weight is None or bool(weight)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _from_json(text: Any) -> Any:
    """The value of JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
