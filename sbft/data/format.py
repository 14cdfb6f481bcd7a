"""From rows of text to token ids and labels: prompt and completion, chat messages, or plain text.

What the model is asked at evaluation must be, token for token, what it saw before the answer in training. Both come
from the same functions here: a text is cut into pieces where an answer begins and ends, each piece is tokenized by
itself, and an answer's prompt is the pieces before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from sbft.data.chat import Piece, end_of_turn, render_messages
from sbft.data.packing import pack
from sbft.data.tables import GrowingTable, dataset_of, pieces
from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained on; cross entropy leaves it out."""


@dataclass(frozen=True)
class FormatReport:
    """What became of the rows."""

    examples: int
    """Examples kept."""
    tokens: int
    """Tokens in them."""
    completion_tokens: int
    """Tokens among them that are trained on."""
    truncated: int
    """Kept examples that were cut at the maximal length."""
    dropped: int
    """Rows left out because nothing to train on was left of them within the maximal length."""
    longest: int
    """Tokens of the longest kept example."""
    packed_into: int | None
    """Rows that the examples were packed into; None where they were not."""
    empty: int = 0
    """Rows left out because their text, or one of question and answer, is missing or empty."""
    unanswered: int = 0
    """Conversations left out because no turn in them is the assistant's."""


@dataclass(frozen=True)
class Rendering:
    """How rows become text: the names of their columns, and whether and how the chat template is used."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    chat_template: bool = True
    """Render prompt and completion as user's and assistant's turn, where the tokenizer has a chat template."""
    system: str | None = None
    """A system turn put before each conversation that has none; the template's own when None."""

    def kind(self, columns: list[str]) -> str:
        """Says how rows with these columns are read: "completion", "messages" or "text".

        Raises:
            DataError: none of the three; names the columns there are.
        """
        if self.prompt in columns and self.completion in columns:
            return "completion"
        if self.messages in columns:
            return "messages"
        if self.text in columns:
            return "text"
        half = [name for name in (self.prompt, self.completion) if name in columns]
        missing = f"{half[0]!r} is there without its other half" if half else "none of them is there"
        raise DataError(
            f"The data has the columns {', '.join(map(repr, columns))}; expected {self.prompt!r} with "
            f"{self.completion!r}, or {self.messages!r}, or {self.text!r}, and {missing}. Name your columns with "
            "data.prompt and data.completion, data.messages, or data.text."
        )

    def columns(self, kind: str) -> list[str]:
        """The columns that rows of this kind are read from."""
        return {
            "completion": [self.prompt, self.completion],
            "messages": [self.messages],
            "text": [self.text],
        }[kind]

    def kind_of_question(self, columns: list[str]) -> str:
        """The same for rows that are only asked: a prompt needs no completion beside it."""
        return "completion" if self.prompt in columns and self.messages not in columns else self.kind(columns)

    def pieces(self, row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """Cuts one row into pieces of text, those that are trained on marked; none where the row holds nothing."""
        if kind == "messages":
            messages = self._conversation(row)
            return render_messages(messages, tokenizer) if messages else []
        if kind == "text":
            text = _text(row, self.text)
            return [Piece(text, True)] if text is not None and text.strip() else []
        question, answer = _text(row, self.prompt), _text(row, self.completion)
        if question is None or answer is None or not answer.strip():
            return []
        if self._uses_template(tokenizer):
            turns = [*self._asked(question), {"role": "assistant", "content": answer}]
            return render_messages(turns, tokenizer, markers=False)
        return [Piece(question, False), Piece(answer, True)]

    def question_pieces(self, row: dict[str, Any], kind: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """The pieces that come before the (last) answer of a row: what is given to the model to be answered."""
        if kind == "messages":
            return render_messages(self._without_answer(self._conversation(row)), tokenizer, ask=True)
        question = _text(row, self.prompt if kind == "completion" else self.text) or ""
        if kind == "completion" and self._uses_template(tokenizer):
            return render_messages(self._asked(question), tokenizer, ask=True, markers=False)
        return [Piece(question, False)]

    def question_and_answer(self, row: dict[str, Any], kind: str) -> tuple[str, str]:
        """A row's question and right answer as plain text, for people to read and metrics to compare."""
        if kind == "completion":
            return _text(row, self.prompt) or "", _text(row, self.completion) or ""
        turns = self._conversation(row)
        asked = self._without_answer(turns)
        answer = turns[-1] if len(turns) > len(asked) else {"content": ""}
        return str(asked[-1]["content"]) if asked else "", str(answer["content"])

    def answer_pieces(
        self, row: dict[str, Any], kind: str, answer: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[Piece]:
        """The pieces of a row with this (last) answer in place of its own; of them, only the answer's are trained on."""
        if kind == "messages":
            turns = [*self._without_answer(self._conversation(row)), {"role": "assistant", "content": answer}]
            pieces = render_messages(turns, tokenizer)
        else:
            pieces = self.pieces({**row, self.completion: answer}, kind, tokenizer)
        last = max(index for index, piece in enumerate(pieces) if piece.trained)
        return [piece._replace(trained=index == last) for index, piece in enumerate(pieces)]

    def _uses_template(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return self.chat_template and bool(tokenizer.chat_template)

    def _asked(self, question: str) -> list[dict[str, Any]]:
        return self._with_system([{"role": "user", "content": question}])

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _conversation(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        turns = []
        conversation = row[self.messages] or []
        if not isinstance(conversation, list):
            raise DataError(
                f"A value of {self.messages!r} is a {type(conversation).__name__}, {str(conversation)[:60]!r}; expected a "
                'list of messages such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], '
                "which .jsonl, .json and .parquet files can hold."
            )
        for message in conversation:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise DataError(
                    f"A value of {self.messages!r} holds {repr(message)[:120]}; expected a list of messages such as "
                    '{"role": "user", "content": "..."}.'
                )
            if not isinstance(message.get("content"), str | list | None):
                raise DataError(
                    f"A message of {self.messages!r} has the content {str(message['content'])[:120]}; expected text."
                )
            # Tables fill the keys that a message lacks with None, which templates take for a value.
            known = {key: value for key, value in message.items() if value is not None}
            turns.append({"content": "", **known})
        return self._with_system(turns) if turns else []

    @staticmethod
    def _without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def format_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    text: str = "text",
    max_length: int = 1024,
    chat_template: bool = True,
    packing: bool = False,
    system: str | None = None,
) -> tuple[Dataset, FormatReport]:
    """Turns rows of text into token ids and labels.

    Trained on are completions, the assistant's turns of `messages`, or all of `text`. Each ends with the token that
    ends a turn or a text. The first token of an example has no label, as nothing predicts it.

    Args:
        dataset: rows with the columns `prompt` and `completion`, or `messages`, or `text` (looked for in this order).
        tokenizer: the model's tokenizer.
        prompt, completion, messages, text: names of the columns.
        max_length: tokens an example is cut to. A row with nothing to train on, before or after, is left out.
        chat_template: render prompt and completion as turns of a chat, where the tokenizer has a template.
        packing: put several examples into one row of at most `max_length` tokens, whose `position_ids` start again
            at 0 with each example, so that attention does not reach from one into another.
        system: a system turn for conversations that have none.

    Returns:
        The dataset with `input_ids` and `labels` (int lists of one length, -100 where nothing is trained on), and
        `position_ids` when packed; and what became of the rows.

    Raises:
        DataError: no such columns, malformed messages, or no example left.
    """
    if max_length < 2:
        raise DataError(f"data.max_length is {max_length}; expected at least 2 tokens, or nothing can be predicted.")
    rendering = Rendering(prompt, completion, messages, text, chat_template, system)
    kind = rendering.kind(dataset.column_names)
    formatted = GrowingTable()
    counts = dict.fromkeys(("examples", "tokens", "completion_tokens", "longest"), 0)
    left_out = dict.fromkeys(("dropped", "empty", "unanswered"), 0)
    truncated = 0
    for columns in pieces(dataset, rendering.columns(kind)):
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples: list[tuple[list[int], list[int]]] = []
        for ids, labels in _examples(rows, rendering, kind, tokenizer):
            if reason := _reason_to_leave_out(labels, max_length, kind):
                left_out[reason] += 1
                continue
            truncated += len(ids) > max_length
            examples.append((ids[:max_length], labels[:max_length]))
        if examples:
            table = _table(examples)
            _count(table, counts)
            formatted.add(table)
    whole = formatted.finish()
    if whole is None:
        reasons = {
            "dropped": f"nothing to train on within data.max_length ({max_length} tokens)",
            "empty": "an empty text, question or answer",
            "unanswered": "no turn of the assistant",
        }
        found = ", ".join(f"{count} had {reasons[reason]}" for reason, count in left_out.items() if count)
        raise DataError(
            f"No example is left: of {dataset.num_rows} rows {found}. Raise data.max_length, or check the columns."
        )
    report = FormatReport(**counts, truncated=truncated, packed_into=None, **left_out)
    if not packing:
        return dataset_of(whole), report
    packed = pack(whole, max_length)
    return dataset_of(packed), replace(report, packed_into=packed.num_rows)


def encode_prompts(
    rows: Dataset | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    text: str = "text",
    chat_template: bool = True,
    system: str | None = None,
) -> list[list[int]]:
    """Tokenizes what comes before the (last) answer of each row, exactly as `format_dataset` does for training.

    Args:
        rows: rows with the column `prompt` (a completion may be absent), or `messages`, whose last assistant turn is
            left out, or `text`, which is to be continued.
        tokenizer: the model's tokenizer.
        prompt, completion, messages, text, chat_template, system: as for `format_dataset`.

    Returns:
        The prompts' token ids, without padding.

    Raises:
        DataError: no such columns, or malformed messages.
    """
    rendering = Rendering(prompt, completion, messages, text, chat_template, system)
    listed = list(rows)
    if not listed:
        return []
    kind = rendering.kind_of_question(list(listed[0]))
    pieces = [rendering.question_pieces(row, kind, tokenizer) for row in listed]
    return [ids for ids, _ in _tokenize(pieces, tokenizer, ends=False)]


def encode_answers(
    rows: Dataset | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str],
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    text: str = "text",
    chat_template: bool = True,
    system: str | None = None,
) -> list[dict[str, list[int]]]:
    """Tokenizes each row with each answer in place of its own, exactly as `format_dataset` does for training.

    Args:
        rows: rows with the column `prompt` (a completion may be absent), or `messages`, whose last assistant turn is
            replaced; its earlier ones have no labels here.
        tokenizer: the model's tokenizer.
        answers: what to put as the answer.
        prompt, completion, messages, text, chat_template, system: as for `format_dataset`.

    Returns:
        `input_ids` and `labels` of the first row with each answer, then of the second row, and so on; nothing is cut.

    Raises:
        DataError: no such columns, malformed messages, plain text, a row without a question, or an empty answer.
    """
    rendering = Rendering(prompt, completion, messages, text, chat_template, system)
    listed = list(rows)
    if not listed:
        return []
    if blank := [answer for answer in answers if not answer.strip()]:
        raise DataError(f"An answer to be compared is {blank[0]!r}; expected at least one word in each.")
    kind = rendering.kind_of_question(list(listed[0]))
    if kind == "text":
        raise DataError("The data is plain text, which has no answers to compare; give prompts and completions.")
    asked = rendering.prompt if kind == "completion" else rendering.messages
    if missing := [row for row in listed if row[asked] in (None, [])]:
        raise DataError(f"A row of the data has no question in {asked!r}: {str(missing[0])[:120]}. Take it out.")
    pieces = [rendering.answer_pieces(row, kind, answer, tokenizer) for row in listed for answer in answers]
    return [{"input_ids": ids, "labels": labels} for ids, labels in _tokenize(pieces, tokenizer, ends=True)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token and the one that ends a turn of its chat template."""
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer) if tokenizer.chat_template else None]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _text(row: dict[str, Any], column: str) -> str | None:
    """A value as text; None where it is missing.

    Raises:
        DataError: it is bytes, or holds other values.
    """
    value = row[column]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | dict | bytes):
        raise DataError(
            f"A value of {column!r} is a {type(value).__name__}, {str(value)[:60]}; expected text. Name the column that "
            "holds text with data.prompt, data.completion or data.text; conversations belong into data.messages."
        )
    return None if isinstance(value, float) and math.isnan(value) else str(value)


def _examples(
    rows: list[dict[str, Any]], rendering: Rendering, kind: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    return _tokenize([rendering.pieces(row, kind, tokenizer) for row in rows], tokenizer, ends=True)


def _tokenize(
    pieces: list[list[Piece]], tokenizer: PreTrainedTokenizerBase, *, ends: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (ids, labels) of each row's pieces; all pieces go through the tokenizer in one call, for speed."""
    flat = [piece.text for row in pieces for piece in row]
    tokenized = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    opening, end = _opening_tokens(tokenizer), tokenizer.eos_token_id
    for row in pieces:
        ids: list[int] = []
        labels: list[int] = []
        if row and not row[0].rendered:
            ids, labels = list(opening), [IGNORED] * len(opening)
        for piece in row:
            tokens = next(tokenized)
            ids += tokens
            labels += tokens if piece.trained else [IGNORED] * len(tokens)
        unended = bool(row) and row[-1].trained and not row[-1].ended
        if ends and unended and end is not None:
            ids.append(end)
            labels.append(end)
        if labels:
            labels[0] = IGNORED
        yield ids, labels


def _opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a plain text (the begin token of Llama, nothing for GPT-2)."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for count in range(len(with_special) - len(without) + 1):
        if with_special[count : count + len(without)] == without:
            return list(with_special[:count])
    return []


def _reason_to_leave_out(labels: list[int], max_length: int, kind: str) -> str | None:
    """The field of `FormatReport` that counts a row with these labels; None where it can be trained on."""
    if any(label != IGNORED for label in labels[:max_length]):
        return None
    if any(label != IGNORED for label in labels):
        return "dropped"
    return "unanswered" if kind == "messages" and labels else "empty"


def _table(examples: list[tuple[list[int], list[int]]]) -> pa.Table:
    integers = pa.list_(pa.int32())
    return pa.table(
        {
            "input_ids": pa.array([ids for ids, _ in examples], type=integers),
            "labels": pa.array([labels for _, labels in examples], type=integers),
        }
    )


def _count(table: pa.Table, counts: dict[str, int]) -> None:
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    labels = table["labels"].combine_chunks().flatten().to_numpy()
    counts["examples"] += table.num_rows
    counts["tokens"] += int(lengths.sum())
    counts["completion_tokens"] += int((labels != IGNORED).sum())
    counts["longest"] = max(counts["longest"], int(lengths.max()))
