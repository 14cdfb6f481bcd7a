"""Conversations as data sets write them, in the one form that chat templates are given."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from sbft.errors import DataError

THOUGHT_ENDS = "</think>"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What data sets and templates call the thoughts of a turn."""
_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_READ = {"role", "content", "tool_calls", "tool_call_id", *REASONING}
_LIKE = 'a list of messages such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation, ready for a chat template."""

    messages: list[Message]
    """Contents are text, the arguments of tool calls objects; a key that a message lacks is absent."""
    learned: tuple[int, ...] = ()
    """Places of the assistant's turns that bear loss."""
    tools: list[Any] | None = None
    """The functions that the assistant may call; None where there are none."""

    def until(self, place: int) -> Chat:
        """The conversation before a turn."""
        learned = tuple(turn for turn in self.learned if turn < place)
        return replace(self, messages=self.messages[:place], learned=learned)

    def answers(self) -> tuple[int, ...]:
        """Places of the assistant's turns that say something."""
        return tuple(
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and _says_something(message)
        )

    def learning_only(self, place: int) -> Chat:
        """The same conversation, of which one turn is learned."""
        return replace(self, learned=(place,))

    def beginning_with(self, system: str | None) -> Chat:
        """The same conversation with this system turn, unless it has one."""
        if system is None or not self.messages or self.messages[0]["role"] in ("system", "developer"):
            return self
        messages = [{"role": "system", "content": system}, *self.messages]
        return replace(self, messages=messages, learned=tuple(place + 1 for place in self.learned))


def conversation(value: Any, column: str, tools: Any = None) -> Chat:
    """Reads the messages of one row, in the form of OpenAI (role, content) or of ShareGPT (from, value).

    Tables fill the keys that an object lacks with None, which templates take for a value: at every depth, None is taken
    for absent. JSON text keeps its null values, be it the arguments of a tool call or a whole list of tools.

    Args:
        value: the row's messages; None for none.
        column: their column, for messages to the user.
        tools: the row's tools: a list, JSON text of one, or None.

    Raises:
        DataError: anything is of another kind than expected.
    """
    listed = _from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if listed is None:
        listed = []
    if not isinstance(listed, list):
        raise DataError(
            f"A value of {column!r} is a {type(listed).__name__}, {str(listed)[:60]!r}; expected {_LIKE}, which .jsonl, "
            ".json and .parquet files can hold."
        )
    messages = [_message(given, column) for given in listed]
    chat = Chat(messages, tools=_tools(tools))
    weighty = [_weight(given, column) for given in listed]
    return replace(chat, learned=tuple(place for place in chat.answers() if weighty[place]))


def question_of(value: Any) -> str:
    """The words of the turns before the first answer, system turns aside; for people, and to compare questions by."""
    turns = []
    for given in value:
        if not isinstance(given, dict):
            break  # what is no message is refused, with its value, where it is rendered
        message = _renamed(given)
        if message.get("role") == "assistant":
            break
        if message.get("role") != "system":
            content = message.get("content")
            turns.append(content if isinstance(content, str) else json.dumps(content))
    return "\n".join(turns)


def holds_reasoning(message: Message) -> bool:
    """Whether an assistant's turn has thoughts, as a key of its own or in its content."""
    return bool(message.get(REASONING[0])) or THOUGHT_ENDS in str(message.get("content", ""))


def keys_not_read(value: Any, template: str) -> set[str]:
    """Keys of a row's messages that nobody reads: neither sbft, nor the chat template by its text."""
    listed = value if isinstance(value, list) else []
    keys = {key for given in listed if isinstance(given, dict) for key, held in given.items() if held is not None}
    if any(isinstance(given, dict) and "from" in given for given in listed):
        keys -= {"from", "value"}
    # A tool's answer has its name beside the id of its call, and most templates need neither.
    return {key for key in keys - _READ - {"weight", "name"} if key not in template}


def _message(given: Any, column: str) -> Message:
    message = _without_none(_renamed(given)) if isinstance(given, dict) else {}
    if not isinstance(message.get("role"), str):
        raise DataError(f"A value of {column!r} holds {repr(given)[:120]}; expected {_LIKE}.")
    content = message.get("content")
    message["content"] = _text(content, column) if isinstance(content, list) else "" if content is None else content
    if not isinstance(message["content"], str):
        raise DataError(f"A message of {column!r} has the content {str(content)[:120]}; expected text.")
    message.pop("weight", None)
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    for key in REASONING:
        message.pop(key, None)
    if reasoning is not None:
        # Under each name, as templates know only one of them.
        message |= dict.fromkeys(REASONING, reasoning)
    calls = message.pop("tool_calls", None)
    calls = _from_json(calls) if isinstance(calls, str) else calls
    if calls:
        message["tool_calls"] = [_call(call, column) for call in calls]
    return message


def _renamed(given: Message) -> Message:
    """A message in the words of OpenAI."""
    message = dict(given)
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
    """The text of a content that comes in parts."""
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise DataError(
                f"A message of {column!r} holds a part of the type {part['type']!r}; expected text alone. Only texts are "
                "read from data files: without its picture or sound the model would learn to answer to a mark."
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
        # What is no object is the model's own doing, such as the source text of a program.
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


def _weight(given: Message, column: str) -> bool:
    weight = given.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(
            f"A message of {column!r} has the weight {str(weight)[:20]}; expected 1, or 0 for a turn that is not learned."
        )
    return weight is None or bool(weight)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_without_none(held) for held in value]
    return value


def _from_json(text: Any) -> Any:
    """The value of JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return None
