"""Questions that two parts of the data share: a model must not train on what it is tested on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from datasets import Dataset

from sbft.data.rendering import CONVERSATIONS, rows_of
from sbft.data.turns import question_of
from sbft.errors import DataError


def refuse_overlap(train: Dataset, rows: Dataset, columns: tuple[str, ...], part: str, source: str) -> None:
    """Refuse to train on questions that a held-out part asks.

    Raises:
        DataError: if there are any. It names `part` and `source`; questions are in the first of `columns` that is there.
    """
    if shared := _shared_questions(train, rows, columns):
        raise DataError(
            f"The {part} data {source} shares {shared} with the training data. A model that trained on its own test "
            "proves nothing: remove them from one of the two, or set data.allow_overlap: true."
        )


def refuse_choice_on_test(
    validation: Dataset, eval: Dataset, columns: tuple[str, ...], sources: tuple[str, str]
) -> None:
    """Refuse to choose settings on questions that the result is reported on.

    Raises:
        DataError: if validation and evaluation data, which `sources` name, share any.
    """
    if shared := _shared_questions(validation, eval, columns):
        raise DataError(
            f"The validation data {sources[0]} shares {shared} with the evaluation data {sources[1]}. A learning rate "
            "would be chosen on the data that it is then tested on: remove them from one of the two, or set "
            "data.allow_overlap: true."
        )


def _shared_questions(first: Dataset, second: Dataset, columns: tuple[str, ...]) -> str | None:
    """Says how many questions of the second are also in the first, and quotes one; None if there are none."""
    # Only the second, smaller data set is held in memory; the first is streamed.
    asked = dict.fromkeys(questions(second, columns))
    shared = {question for question in questions(first, columns) if question in asked}
    both = [question for question in asked if question in shared]
    if not both:
        return None
    return f"{len(both)} question{'s' * (len(both) > 1)} (the first: {both[0][:120]!r})"


def questions(dataset: Dataset, columns: Iterable[str] = ("prompt", "messages", "text")) -> Iterator[str]:
    """Yields each row's question, normalized: its prompt, its turns before the first answer, or its text.

    In Alpaca's rows, whose prompt is `instruction`, the question includes `input`.
    """
    names = (*columns, CONVERSATIONS)
    name = next((column for column in names if column in dataset.column_names), None)
    if name is None:
        return
    joined = [column for column in ("input",) if name == "instruction" and column in dataset.column_names]
    for row in rows_of(dataset, [name, *joined]):
        value = row[name]
        text = question_of(value) if isinstance(value, list) else "" if value is None else str(value)
        yield normalized(" ".join([text, *(str(row[column] or "") for column in joined)]))


def normalized(text: str) -> str:
    """The text in lower case, with each run of white space as one space."""
    return " ".join(text.split()).casefold()
