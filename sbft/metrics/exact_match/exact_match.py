"""Exact match: the share of answers whose final answer is the reference's, letter for letter.

This file stands alone: the package `evaluate` copies it and loads the copy.
"""

from decimal import Decimal, InvalidOperation

import datasets
import evaluate

_DESCRIPTION = """
The share of predictions whose final answer equals that of the reference. The final answer is what follows `answer_after`, if
that is given and present. Else it is what follows the last "####" on its line, else the contents of the last \\boxed{}, else
the whole text. White space at both ends is ignored, and white space inside counts as one space. An empty answer matches
nothing.
"""

_INPUTS = """
Args:
    predictions (list of str): what the model answered.
    references (list of str): the right answers.
    ignore_case (bool): treat upper and lower case as equal. Default False.
    ignore_punctuation (bool): leave out punctuation at both ends, except signs. Default False.
    numeric (bool): compare numbers as numbers, without thousands separators, currency and per cent signs. Default False.
    answer_after (str): words before the final answer, such as "The answer is:". The answer ends with its line; a full
        stop at its end is left out. Default None.
Returns:
    exact_match (float): between 0 and 1.
"""

_BOXED = "\\boxed{"
_PUNCTUATION = " .,;:!?\"'`*()[]"


def final_answer(text: str, answer_after: str | None = None) -> str:
    """The part of an answer that counts, with single spaces."""
    if answer_after and answer_after in text:
        line = text.rpartition(answer_after)[2].strip().partition("\n")[0]
        text = line.strip().removesuffix(".")
    elif "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    elif _BOXED in text:
        text = _up_to_its_brace(text.rpartition(_BOXED)[2])
    return " ".join(text.split())


def _up_to_its_brace(text: str) -> str:
    """The text up to the brace that closes one opened before it; all of the text if none does."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:index]
    return text


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").strip(" .!?$%"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def is_match(
    prediction: str,
    reference: str,
    *,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    numeric: bool = False,
    answer_after: str | None = None,
) -> bool:
    """Whether one prediction's final answer is the reference's."""
    answers = [final_answer(text, answer_after) for text in (prediction, reference)]
    if not all(answers):
        return False
    if numeric:
        numbers = [_number(answer) for answer in answers]
        if None not in numbers:
            return numbers[0] == numbers[1]
    if ignore_case:
        answers = [answer.casefold() for answer in answers]
    if ignore_punctuation:
        answers = [answer.strip(_PUNCTUATION) for answer in answers]
    return answers[0] == answers[1]


class ExactMatch(evaluate.Metric):
    """The metric as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        numeric: bool = False,
        answer_after: str | None = None,
    ) -> dict[str, float]:
        matches = [
            is_match(
                prediction,
                reference,
                ignore_case=ignore_case,
                ignore_punctuation=ignore_punctuation,
                numeric=numeric,
                answer_after=answer_after,
            )
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(matches) / len(matches)}
