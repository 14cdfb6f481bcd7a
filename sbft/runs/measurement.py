"""How a model is measured as its recipe says: before training, after it, or later by `sbft eval`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sbft.data.collate import Collator
from sbft.data.rendering import Rendering
from sbft.data.windows import TokenWindows
from sbft.evaluation.generate import evaluate
from sbft.evaluation.likelihood import bits_per_byte, evaluate_loss, pad_token
from sbft.metrics import BITS_PER_BYTE
from sbft.native.memory import PeakMemory
from sbft.recipe import Recipe
from sbft.runs.prepare import Prepared, evaluation_rows
from sbft.runs.record import RunRecord


def measure(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | TokenWindows,
    predictions: Path | None = None,
) -> dict[str, float]:
    """Measure a model as a recipe says.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        model: on the device where it runs.
        tokenizer: the model's tokenizer.
        rows: what to measure on; of windows of tokens only the loss is measured.
        predictions: JSONL file to write the answers to.

    Returns:
        Metrics by name, as `sbft.evaluation.generate.evaluate` returns them.

    Raises:
        DataError: if the rows cannot be measured by these metrics.
    """
    settings = recipe.evaluation
    if isinstance(rows, TokenWindows):
        windows = rows.rows()
        loss = evaluate_loss(model, windows, Collator(pad_token(tokenizer)), batch_size=settings.batch_size)
        return {**loss, BITS_PER_BYTE: bits_per_byte(loss["loss"], windows, tokenizer)}
    return evaluate(
        model,
        tokenizer,
        rows,
        Rendering.of(recipe.data),
        metrics=settings.metrics,
        metric_options=settings.metric_options,
        labels=settings.labels,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        limit=settings.limit,
        max_length=recipe.data.max_length,
        predictions_path=predictions,
    )


def measure_and_record(
    prepared: Prepared, model: PreTrainedModel, record: RunRecord, predictions: Path | None = None
) -> dict[str, float]:
    """Measure a run's model on the run's evaluation rows, of which there must be some.

    What it took in seconds and bytes goes into the record. The metrics are returned, because the record has two places for
    them.
    """
    rows = evaluation_rows(prepared.splits)
    assert rows is not None
    begin = time.perf_counter()
    with PeakMemory(model.device) as peak:
        metrics = measure(prepared.recipe, model, prepared.tokenizer, rows, predictions)
    record.eval_s = time.perf_counter() - begin
    record.memory["evaluation_peak"] = max(peak.peak_bytes, record.memory.get("evaluation_peak") or 0)
    record.evaluated_on = "eval" if prepared.splits.eval is not None else "validation"
    if predictions is not None and predictions.exists():
        record.predictions = predictions.name
    return metrics


def measure_watched(
    prepared: Prepared, model: PreTrainedModel, record: RunRecord, moment: Literal["metrics_before", "metrics"]
) -> None:
    """Measure a run's model on the data that the recipe watches, and add what is measured to the record.

    Args:
        prepared: what the run reads.
        model: on the device where it runs.
        record: of the run. Data with figures of this moment are left out: an earlier session has measured them.
        moment: whether this is before training, or after it.
    """
    recipe = prepared.recipe
    settings = recipe.evaluation
    for name, watched in prepared.watched.items():
        figures = record.watched.setdefault(name, {"examples": len(watched.rows)})
        if moment == "metrics_before" and moment in figures:
            continue
        own = settings.watch[name]
        with PeakMemory(model.device) as peak:
            figures[moment] = evaluate(
                model,
                prepared.tokenizer,
                watched.rows,
                watched.rendering,
                metrics=own.metrics,
                metric_options=settings.metric_options,
                max_new_tokens=own.max_new_tokens or settings.max_new_tokens,
                batch_size=settings.batch_size,
                max_length=recipe.data.max_length,
            )
        record.memory["evaluation_peak"] = max(peak.peak_bytes, record.memory.get("evaluation_peak") or 0)
