"""Accuracy of labels: the share of answers that name the right label first, whatever follows it.

This file stands alone: the package `evaluate` copies it and loads the copy.
"""

import re

import datasets
import evaluate

_DESCRIPTION = """
The share of predictions whose label is the reference's. The labels are the different references. The label of a
prediction is the first one that it names, as a whole word, in upper or lower case. If two labels begin at the same place,
the longer one counts. A prediction that names no label is wrong. For tasks with few labels, such as yes and no.
"""

_INPUTS = """
Args:
    predictions (list of str): what the model answered.
    references (list of str): the right labels.
Returns:
    accuracy (float): between 0 and 1.
"""


def first_label(text: str, labels: list[str]) -> str | None:
    """The label that a text names first, or None."""
    longest_first = sorted(labels, key=len, reverse=True)
    match = re.search(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", text.casefold())
    return match.group() if match else None


class Accuracy(evaluate.Metric):
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

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = [reference.strip().casefold() for reference in references]
        labels = sorted(set(right))
        named = [first_label(prediction, labels) for prediction in predictions]
        return {"accuracy": sum(name == label for name, label in zip(named, right, strict=True)) / len(right)}
