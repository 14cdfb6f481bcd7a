"""How rows become text: which of their columns are read, and whether and how the chat template is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset

from sbft.data.chat import THINKING, ChatFormat, Piece
from sbft.data.tables import pieces
from sbft.data.turns import THOUGHT_ENDS, Chat, conversation, holds_reasoning, keys_not_read
from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sbft.recipe.schema import DataConfig, SourceConfig

CONVERSATIONS = "conversations"
"""The messages column of ShareGPT files."""
_ALPACA = ("instruction", "input", "output")
_SHOWN_KEYS_OF = 1_000

Rows: TypeAlias = Dataset | list[dict[str, Any]]


@dataclass(frozen=True)
class Rendering:
    """How rows become text: the names of their columns, and whether and how the chat template is used."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    chat_template: bool = True
    """Render prompt and completion as a user's and an assistant's turn, if the tokenizer has a chat template."""
    system: str | None = None
    """A system turn for conversations that have none; None leaves it to the template."""
    tools: str = "tools"
    """Column, beside messages or a prompt, with the functions that the assistant may call."""
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    """Variables of the chat template."""

    @classmethod
    def of(cls, data: DataConfig) -> Rendering:
        """The rendering that the `data` section of a recipe asks for."""
        return cls(**{setting.name: getattr(data, setting.name) for setting in fields(cls)})

    @classmethod
    def of_other(cls, source: SourceConfig, data: DataConfig) -> Rendering:
        """The rendering of other data: as the `data` section asks for, with the columns that the source names."""
        named = {name: getattr(source, name) for name in ("prompt", "completion", "messages", "text")}
        return replace(cls.of(data), **{name: column for name, column in named.items() if column is not None})

    def kind(self, columns: list[str]) -> str:
        """How rows with these columns are read: "completion", "messages" or "text".

        Raises:
            DataError: the columns allow none of the three; the message names them.
        """
        if self.prompt in columns and self.completion in columns:
            return "completion"
        if self._messages_column(columns) in columns:
            return "messages"
        if self.text in columns:
            return "text"
        half = [name for name in (self.prompt, self.completion) if name in columns]
        missing = f"{half[0]!r} is there without its other half" if half else "none of them is there"
        advice = "Name your columns with data.prompt and data.completion, data.messages, or data.text."
        if {"instruction", "output"} <= set(columns):
            advice = "Type --set data.prompt=instruction --set data.completion=output; `input` is then read, too."
        raise DataError(
            f"The data has the columns {', '.join(map(repr, columns))}; expected {self.prompt!r} with "
            f"{self.completion!r}, or {self.messages!r}, or {self.text!r}, but {missing}. {advice}"
        )

    def columns(self, kind: str, present: Iterable[str]) -> list[str]:
        """Those of the present columns that rows of this kind are read from."""
        names = list(present)
        read = {
            "completion": [self.prompt, *self._joined(names), self.completion, self.tools],
            "messages": [self._messages_column(names), self.tools],
            "text": [self.text],
        }[kind]
        return [name for name in dict.fromkeys(read) if name in names]

    def kind_of_question(self, columns: list[str]) -> str:
        """As `kind`, for rows that need no answer: a prompt may come without a completion."""
        is_prompt = self.prompt in columns and self._messages_column(columns) not in columns
        return "completion" if is_prompt else self.kind(columns)

    def not_read(self, dataset: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Columns, and keys of messages, that neither sbft nor the chat template reads."""
        unread = [name for name in dataset.column_names if name not in self.columns(kind, dataset.column_names)]
        if kind != "messages":
            return unread
        column = self._messages_column(dataset.column_names)
        rows = dataset.select_columns([column]).select(range(min(_SHOWN_KEYS_OF, dataset.num_rows)))
        keys = {key for value in rows[column] for key in keys_not_read(value, str(tokenizer.chat_template))}
        return unread + [f"{column}[].{key}" for key in sorted(keys)]

    def thinking(self, rows: Iterable[Rows], tokenizer: PreTrainedTokenizerBase) -> Rendering:
        """This rendering with enable_thinking set, if the template knows it and the settings leave it open.

        It is true if any answer in the rows contains reasoning. Otherwise it is false, in training and in evaluation:
        the data has answers without thoughts.
        """
        variables = dict(self.chat_template_kwargs or {})
        if THINKING in variables or THINKING not in str(tokenizer.chat_template):
            return self
        thinks = any(self._any_reasoning(each, tokenizer) for each in rows)
        return replace(self, chat_template_kwargs={**variables, THINKING: thinks})

    def uses_template(self, kind: str, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether rows of this kind are rendered by the chat template."""
        return kind == "messages" or (kind == "completion" and self.chat_template and bool(tokenizer.chat_template))

    def format_of(self, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """The chat template with this rendering's variables; it remembers the shapes that it has seen."""
        return ChatFormat(tokenizer, self.chat_template_kwargs)

    def examples(self, row: dict[str, Any], kind: str, template: ChatFormat) -> list[list[Piece]]:
        """Cuts one row into pieces of text, and marks those that are trained on; an empty row has no pieces.

        A conversation becomes several examples if the chat template renders its earlier answers differently.
        """
        if kind == "messages":
            chat = self._conversation(row)
            return template.examples(chat) if chat.messages else [[]]
        if kind == "text":
            text = _text(row, self.text)
            return [[Piece(text, True)] if text is not None and text.strip() else []]
        question, answer = self._question(row), _text(row, self.completion)
        if question is None or answer is None or not answer.strip():
            return [[]]
        if self.uses_template(kind, template.tokenizer):
            return template.examples(self._answered(self._asked(row, question), answer), markers=False)
        return [[Piece(question, False), Piece(answer, True)]]

    def question_pieces(self, row: dict[str, Any], kind: str, template: ChatFormat) -> list[Piece]:
        """The pieces before the (last) answer of a row, which are the prompt."""
        if kind == "messages":
            return template.prompt(self._without_answer(self._conversation(row)))
        question = (self._question(row) if kind == "completion" else _text(row, self.text)) or ""
        if self.uses_template(kind, template.tokenizer):
            return template.prompt(self._asked(row, question))
        return [Piece(question, False)]

    def question_and_answer(self, row: dict[str, Any], kind: str) -> tuple[str, str]:
        """A row's question and right answer as plain text, for readers and for metrics."""
        if kind == "completion":
            return self._question(row) or "", _text(row, self.completion) or ""
        chat = self._conversation(row)
        asked = self._without_answer(chat)
        answer = chat.messages[-1]["content"] if len(chat.messages) > len(asked.messages) else ""
        return str(asked.messages[-1]["content"]) if asked.messages else "", answer

    def answer_pieces(self, row: dict[str, Any], kind: str, answer: str, template: ChatFormat) -> list[Piece]:
        """The pieces of a row with this (last) answer in place of its own; only the answer is trained on."""
        if kind == "messages":
            pieces = template.examples(self._answered(self._without_answer(self._conversation(row)), answer))[0]
        else:
            pieces = self.examples({**row, self.completion: answer}, kind, template)[0]
        last = max(index for index, piece in enumerate(pieces) if piece.trained)
        return [piece._replace(trained=index == last) for index, piece in enumerate(pieces)]

    def roles(self, dataset: Dataset) -> list[str]:
        """The roles in a data set's messages."""
        rows = rows_of(dataset, self.columns("messages", dataset.column_names))
        return sorted({message["role"] for row in rows for message in self._conversation(row).messages})

    def _messages_column(self, columns: Iterable[str]) -> str:
        default = self.messages == "messages" and "messages" not in columns
        return CONVERSATIONS if default else self.messages

    def _joined(self, columns: Iterable[str]) -> list[str]:
        """Columns to append to the question: `input`, if the columns are instruction, input and output (Alpaca)."""
        alpaca = (self.prompt, "input", self.completion) == _ALPACA and "input" in columns
        return ["input"] if alpaca else []

    def _question(self, row: dict[str, Any]) -> str | None:
        question = _text(row, self.prompt)
        joined = [text for name in self._joined(row) if (text := _text(row, name)) and text.strip()]
        return question if question is None else "\n\n".join([question, *joined])

    def _asked(self, row: dict[str, Any], question: str) -> Chat:
        turn = {"role": "user", "content": question}
        return conversation([turn], self.prompt, row.get(self.tools)).beginning_with(self.system)

    def _conversation(self, row: dict[str, Any]) -> Chat:
        column = self._messages_column(row)
        return conversation(row[column], column, row.get(self.tools)).beginning_with(self.system)

    def _any_reasoning(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> bool:
        names = rows.column_names if isinstance(rows, Dataset) else list(rows[0] if rows else ())
        kind = self.kind_of_question(names)
        if not self.uses_template(kind, tokenizer):
            return False
        each = rows_of(rows, self.columns(kind, names)) if isinstance(rows, Dataset) else rows
        if kind == "completion":
            return any(THOUGHT_ENDS in str(row.get(self.completion)) for row in each)
        chats = (self._conversation(row) for row in each)
        return any(holds_reasoning(chat.messages[place]) for chat in chats for place in chat.learned)

    @staticmethod
    def _answered(chat: Chat, answer: str) -> Chat:
        place = len(chat.messages)
        turn = {"role": "assistant", "content": answer}
        return replace(chat, messages=[*chat.messages, turn], learned=(*chat.learned, place))

    @staticmethod
    def _without_answer(chat: Chat) -> Chat:
        answered = chat.messages and chat.messages[-1]["role"] == "assistant"
        return chat.until(len(chat.messages) - 1) if answered else chat


def rows_of(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows, with these columns only."""
    for piece in pieces(dataset, columns):
        for values in zip(*piece.values(), strict=True):
            yield dict(zip(piece, values, strict=True))


def _text(row: dict[str, Any], column: str) -> str | None:
    """A value as text; None if it is missing.

    Raises:
        DataError: it is bytes, a list or an object.
    """
    value = row[column]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | dict | bytes):
        raise DataError(
            f"A value of {column!r} is a {type(value).__name__}, {str(value)[:60]}; expected text. Name the column that "
            "holds text with data.prompt, data.completion or data.text; conversations belong in data.messages."
        )
    return None if isinstance(value, float) and math.isnan(value) else str(value)
