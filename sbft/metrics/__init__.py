"""Metrics of generated answers, as modules of the package `evaluate` that ship with sbft: nothing is downloaded."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from sbft.errors import DataError

ALWAYS = ("loss", "perplexity")
"""What is measured of all data, in nats per token and as its exponential."""
BITS_PER_BYTE = "bits_per_byte"
"""Of plain text: the bits that the model needs for each byte of it, whatever its tokenizer."""
LOWER_IS_BETTER = frozenset({*ALWAYS, BITS_PER_BYTE})
_FOLDER = Path(__file__).parent


def available() -> list[str]:
    """Names of the metrics that ship here."""
    return sorted(path.stem for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name)


def check(names: list[str]) -> None:
    """Makes sure that metrics of these names exist, before any long work begins.

    Raises:
        DataError: there is no metric of one of the names.
    """
    for name in names:
        if name in available() or name in (*ALWAYS, BITS_PER_BYTE, "label_accuracy"):
            continue
        near = difflib.get_close_matches(name, available(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(
            f"There is no metric {name!r}; there are {', '.join(available())}, besides loss and perplexity, which are "
            f"always measured.{hint} Correct evaluation.metrics."
        )


def compute(name: str, predictions: list[str], references: list[str], **options: Any) -> float:
    """Computes one metric through `evaluate`.

    Args:
        name: one of `available()`.
        predictions: what the model answered.
        references: the right answers, one for each prediction.
        **options: the metric's own options, for example `ignore_case=True`.

    Raises:
        DataError: there is no metric of that name.
    """
    import evaluate

    check([name])
    metric = evaluate.load(str(_FOLDER / name / f"{name}.py"), keep_in_memory=True)
    result: dict[str, float] = metric.compute(predictions=predictions, references=references, **options)
    return float(result[name])
