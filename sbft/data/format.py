"""Turns rows of text into token ids and labels: prompt and completion, chat messages, or plain text.

At evaluation, the model must get exactly the tokens that were before the answer in training. So both come from the same
functions here. A text is cut into pieces where an answer begins and ends, and each piece is tokenized separately. The prompt
of an answer is the pieces before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from sbft.data.chat import Piece, ends_of_turns
from sbft.data.collate import IGNORED_LABEL
from sbft.data.packing import pack
from sbft.data.rendering import Rendering
from sbft.data.tables import GrowingTable, dataset_of, pieces
from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FormatReport:
    """How many rows were kept, cut or left out, and why."""

    examples: int
    """Examples kept."""
    tokens: int
    """Tokens in them."""
    completion_tokens: int
    """Tokens among them that are trained on."""
    truncated: int
    """Kept examples that were cut to the maximum length."""
    dropped: int
    """Rows left out because nothing to train on was left within the maximum length."""
    longest: int
    """Tokens of the longest kept example."""
    packed_into: int | None
    """Rows that the examples were packed into; None without packing."""
    replay_examples: int = 0
    """Examples among them that are of an old kind: `data.replay`."""
    replay_tokens: int = 0
    """Tokens among them that are."""
    empty: int = 0
    """Rows left out because the text, the question or the answer is missing or empty."""
    unanswered: int = 0
    """Conversations left out because they have no turn of the assistant to learn."""
    divided: int = 0
    """Conversations that became several examples, as the chat template changes answers once later turns follow."""
    unread: tuple[str, ...] = ()
    """Columns of the data that were not read, and keys of its messages that neither sbft nor the template knows."""


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
    tools: str = "tools",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Dataset, FormatReport]:
    """Turns rows of text into token ids and labels.

    The model is trained on completions, on the assistant's turns of `messages`, or on all of `text`. Each ends with the
    token that ends a turn or a text. The first token of an example has no label, as nothing predicts it. An assistant's
    turn is learned whole: text, reasoning and tool calls. A turn with `weight` 0 is not learned.

    Args:
        dataset: rows with the columns `prompt` and `completion`, or `messages`, or `text` (looked for in this order).
        tokenizer: the model's tokenizer.
        prompt, completion, messages, text: names of the columns.
        max_length: tokens to cut an example to. A row with nothing to train on, before or after the cut, is left out.
        chat_template: render prompt and completion as turns of a chat, if the tokenizer has a template.
        packing: put several examples into one row of at most `max_length` tokens. Its `position_ids` restart at 0 with
            each example, so attention does not reach from one into another.
        system: a system turn for conversations that have none.
        tools: name of the column, beside messages or a prompt, with the functions that the assistant may call: lists,
            or JSON text.
        chat_template_kwargs: variables of the chat template, such as enable_thinking. If the template knows
            that one and it is not given, it is true if any answer in the data contains reasoning, else false.

    Returns:
        The dataset with `input_ids` and `labels` (int lists of equal length, -100 for tokens that are not trained on),
        and `position_ids` when packed; and a report on the rows.

    Raises:
        DataError: the columns are missing, messages are malformed, the chat template loses part of them, or no example
            is left.
    """
    rendering = Rendering(prompt, completion, messages, text, chat_template, system, tools, chat_template_kwargs)
    return format_rows(dataset, tokenizer, rendering, max_length=max_length, packing=packing)


def format_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    *,
    max_length: int = 1024,
    packing: bool = False,
) -> tuple[Dataset, FormatReport]:
    """As `format_dataset`, for settings that are already one object."""
    table, report = format_table(dataset, tokenizer, rendering, max_length=max_length)
    return packed_rows(table, report, max_length) if packing else (dataset_of(table), report)


def packed_rows(table: pa.Table, report: FormatReport, max_length: int) -> tuple[Dataset, FormatReport]:
    """The packed rows of examples, and the report with their number."""
    packed = pack(table, max_length)
    return dataset_of(packed), replace(report, packed_into=packed.num_rows)


def format_table(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, *, max_length: int
) -> tuple[pa.Table, FormatReport]:
    """As `format_rows`, as a table that is not packed."""
    if max_length < 2:
        raise DataError(f"data.max_length is {max_length}; expected at least 2 tokens, or nothing can be predicted.")
    kind = rendering.kind(dataset.column_names)
    rendering = rendering.thinking([dataset], tokenizer)
    template = rendering.format_of(tokenizer)
    formatted = GrowingTable()
    counts = dict.fromkeys(("examples", "tokens", "completion_tokens", "longest"), 0)
    left_out = dict.fromkeys(("dropped", "empty", "unanswered"), 0)
    truncated = 0
    divided = 0
    for columns in pieces(dataset, rendering.columns(kind, dataset.column_names)):
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        texts = [rendering.examples(row, kind, template) for row in rows]
        divided += sum(len(of_row) > 1 for of_row in texts)
        examples: list[tuple[list[int], list[int]]] = []
        for ids, labels in _tokenize([text for of_row in texts for text in of_row], tokenizer, ends=True):
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
        raise DataError(_nothing_left(dataset, rendering, kind, left_out, max_length))
    unread = tuple(rendering.not_read(dataset, kind, tokenizer))
    report = FormatReport(**counts, truncated=truncated, packed_into=None, **left_out, divided=divided, unread=unread)
    return whole, report


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
    tools: str = "tools",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Tokenizes what comes before the (last) answer of each row, exactly as `format_dataset` does for training.

    Args:
        rows: rows with the column `prompt` (a completion may be absent), or `messages`, whose last assistant turn is
            left out, or `text`, which is to be continued.
        tokenizer: the model's tokenizer.
        prompt, completion, messages, text, chat_template, system, tools, chat_template_kwargs: as for `format_dataset`.

    Returns:
        The prompts' token ids, without padding.

    Raises:
        DataError: the columns are missing, or messages are malformed.
    """
    rendering = Rendering(prompt, completion, messages, text, chat_template, system, tools, chat_template_kwargs)
    return encode_questions(rows, tokenizer, rendering)


def encode_questions(
    rows: Dataset | Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> list[list[int]]:
    """As `encode_prompts`, for settings that are already one object."""
    listed = list(rows)
    if not listed:
        return []
    kind = rendering.kind_of_question(list(listed[0]))
    template = rendering.thinking([listed], tokenizer).format_of(tokenizer)
    pieces = [rendering.question_pieces(row, kind, template) for row in listed]
    return [ids for ids, _ in _tokenize(pieces, tokenizer, ends=False)]


def encode_answers(
    rows: Dataset | Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str],
    rendering: Rendering | None = None,
) -> list[dict[str, list[int]]]:
    """Tokenizes each row with each answer in place of its own, exactly as `format_dataset` does for training.

    Args:
        rows: rows with the column `prompt` (a completion may be absent), or `messages`, whose last assistant turn is
            replaced; its earlier ones have no labels here.
        tokenizer: the model's tokenizer.
        answers: the answers to put in.
        rendering: how rows become text; `Rendering()` if None.

    Returns:
        `input_ids` and `labels` of the first row with each answer, then of the second row, and so on; nothing is cut.

    Raises:
        DataError: the columns are missing, messages are malformed, the data is plain text, a row has no question, or an
            answer is empty.
    """
    rendering, listed = rendering or Rendering(), list(rows)
    if not listed:
        return []
    if blank := [answer for answer in answers if not answer.strip()]:
        raise DataError(f"An answer to be compared is {blank[0]!r}; expected at least one word in each.")
    kind = rendering.kind_of_question(list(listed[0]))
    if kind == "text":
        raise DataError("The data is plain text, which has no answers to compare; give prompts and completions.")
    asked = rendering.columns(kind, listed[0])[0]
    if missing := [row for row in listed if row[asked] in (None, [])]:
        raise DataError(f"A row of the data has no question in {asked!r}: {str(missing[0])[:120]}. Remove it.")
    template = rendering.thinking([listed], tokenizer).format_of(tokenizer)
    pieces = [rendering.answer_pieces(row, kind, answer, template) for row in listed for answer in answers]
    return [{"input_ids": ids, "labels": labels} for ids, labels in _tokenize(pieces, tokenizer, ends=True)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token and those that end turns of its chat template."""
    ends = [tokenizer.eos_token_id, *(ends_of_turns(tokenizer) if tokenizer.chat_template else [])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _nothing_left(dataset: Dataset, rendering: Rendering, kind: str, left_out: dict[str, int], max_length: int) -> str:
    reasons = {
        "dropped": f"nothing to train on within data.max_length ({max_length} tokens)",
        "empty": "an empty text, question or answer",
        "unanswered": "no turn of the assistant to learn",
    }
    causes = ", ".join(f"{count} had {reasons[reason]}" for reason, count in left_out.items() if count)
    advice = "Raise data.max_length, or check the columns." if left_out["dropped"] else "Check the columns."
    if left_out["unanswered"]:
        roles = ", ".join(repr(role) for role in rendering.roles(dataset))
        advice = f"The roles are {roles}; the turns to learn have the role 'assistant', and no weight of 0."
    return f"No example is left: of {dataset.num_rows} rows {causes}. {advice}"


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
            ids, labels = list(opening), [IGNORED_LABEL] * len(opening)
        for index, piece in enumerate(row):
            tokens = next(tokenized)
            if index == 0 and ids and tokens[: len(ids)] == ids:  # the text already begins with the begin token
                ids, labels = [], []
            ids += tokens
            labels += tokens if piece.trained else [IGNORED_LABEL] * len(tokens)
        unended = bool(row) and row[-1].trained and not row[-1].ended
        if ends and unended and end is not None:
            ids.append(end)
            labels.append(end)
        if labels:
            labels[0] = IGNORED_LABEL
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
    """The field of `FormatReport` that counts a row with these labels; None if it can be trained on."""
    if any(label != IGNORED_LABEL for label in labels[:max_length]):
        return None
    if any(label != IGNORED_LABEL for label in labels):
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
    counts["completion_tokens"] += int((labels != IGNORED_LABEL).sum())
    counts["longest"] = max(counts["longest"], int(lengths.max()))
