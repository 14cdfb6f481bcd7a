"""How good a model is: the loss of the right answers, the likeliest of several labels, and scores of generated answers."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sbft import metrics as metric_modules
from sbft.data.collate import Collator, left_pad
from sbft.data.format import encode_questions, format_rows, stop_tokens
from sbft.data.rendering import Rendering
from sbft.data.turns import THOUGHT_ENDS
from sbft.errors import DataError
from sbft.evaluation.likelihood import bits_per_byte, evaluate_loss, evaluating, label_likelihoods, pad_token
from sbft.metrics import ALWAYS, BITS_PER_BYTE
from sbft.models.limits import refuse_what_does_not_fit, table_of_positions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LABEL_ACCURACY = "label_accuracy"
_MOST_LABELS = 50
"""`labels: auto` accepts at most this many different answers as labels."""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Let the model answer prompts by greedy decoding.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad token.
        prompts: token ids, as `sbft.data.encode_prompts` returns them.
        max_new_tokens: tokens of the longest answer. An answer ends earlier with an end token, or the end of its turn.
        batch_size: prompts per batch; prompts of similar length share one.

    Returns:
        The answers as text without special tokens, in the order of the prompts.

    Raises:
        DataError: if a prompt is empty.
        ModelError: if a token is not in the model's embedding, or a prompt is too long for its position table.
    """
    from transformers import GenerationConfig

    if not all(prompts):
        raise DataError(f"Prompt {prompts.index([]) + 1} is empty, so there is nothing to answer.")
    refuse_what_does_not_fit(model, prompts, "a prompt", more=1)
    end = table_of_positions(model, max(map(len, prompts), default=0) + max_new_tokens)
    if end is not None:
        logger.warning(
            f"After some prompts, an answer of {max_new_tokens:,} tokens does not fit the model's {end:,} positions. It is "
            "cut off."
        )
    # All set explicitly: generate() takes what is missing from the checkpoint, whose settings are for sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = left_pad([prompts[index] for index in indices], pad_token(tokenizer))
            if end is not None:
                settings.max_new_tokens = min(max_new_tokens, end - len(prompts[indices[0]]))  # the longest one
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            generator: Any = model
            written = generator.generate(**on_device, generation_config=settings)[:, batch["input_ids"].shape[1] :]
            for index, text in zip(indices, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                answers[index] = text
    return answers


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    rendering: Rendering | None = None,
    *,
    metrics: list[str],
    max_length: int = 1024,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    limit: int | None = None,
    metric_options: dict[str, dict[str, Any]] | None = None,
    labels: list[str] | Literal["auto"] | None = None,
    predictions_path: str | Path | None = None,
) -> dict[str, float]:
    """Measure a model on rows of text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: rows as `sbft.data.sources` loads them.
        rendering: how rows become text; `Rendering()` if None.
        metrics: names of metrics in `sbft.metrics`. They score generated answers, without the reasoning before them.
            label_accuracy may be among them if there are labels.
        max_length: tokens that a row is cut to.
        max_new_tokens: tokens of the longest answer.
        batch_size: rows per batch.
        limit: use only this many rows, the first ones.
        metric_options: options of each metric, by its name.
        labels: the answers to choose from; the model's choice is the likeliest (see `label_likelihoods`). "auto" takes the
            different answers in all `rows`, whatever the limit.
        predictions_path: where to write one JSON object per row: prompt and reference; prediction and exact_match if
            answers are generated; label, label_match and log_probabilities if there are labels. Without either, nothing
            is written.

    Returns:
        "loss", "perplexity", "bits_per_byte" of plain text, "label_accuracy" if there are labels, and each metric by its name.

    Raises:
        DataError: as from `format_dataset` and `label_likelihoods`; if a metric is unknown; if a right answer is not among
            the labels; or if plain text, which has no right answers, is given metrics or labels.
    """
    rendering = rendering or Rendering()
    kind = rendering.kind(rows.column_names)
    scores = _checked(metrics, labels, kind)
    references = _references(rows, rendering, kind) if scores or labels else []
    words = _label_words(labels, references) if labels else []
    if limit is not None:
        rows = rows.select(range(min(limit, rows.num_rows)))
        references = references[:limit]
    if words:
        _check_references(references, words)
    _check_answered(references)
    rendering = rendering.thinking([rows], tokenizer)
    formatted, _ = format_rows(rows, tokenizer, rendering, max_length=max_length)
    result = evaluate_loss(model, formatted, Collator(pad_token(tokenizer)), batch_size=batch_size)
    if kind == "text":
        result[BITS_PER_BYTE] = bits_per_byte(result["loss"], formatted, tokenizer)
    if not scores and not words:
        return result

    questions = [rendering.question_and_answer(row, kind)[0] for row in rows]
    predictions: list[dict[str, Any]] = [
        {"prompt": question, "reference": reference} for question, reference in zip(questions, references, strict=True)
    ]
    options = metric_options or {}
    if scores:
        # Imports evaluate and scipy, which takes over a second: only where answers are scored.
        from sbft.metrics.exact_match.exact_match import is_match

        encoded = encode_questions(rows, tokenizer, rendering)
        answers = generate_answers(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
        matching = options.get("exact_match", {})
        for row, answer in zip(predictions, answers, strict=True):
            row |= {"prediction": answer, "exact_match": is_match(_after_thoughts(answer), row["reference"], **matching)}
        answers = [_after_thoughts(answer) for answer in answers]
    if words:
        likelihoods = label_likelihoods(
            model, tokenizer, rows, words, rendering, max_length=max_length, batch_size=batch_size
        )
        for row, of_labels in zip(predictions, likelihoods.tolist(), strict=True):
            row |= _chosen_label(row["reference"], words, of_labels)
        result[LABEL_ACCURACY] = sum(row["label_match"] for row in predictions) / len(predictions)
    for name in scores:
        result[name] = metric_modules.compute(name, answers, references, **options.get(name, {}))
    if predictions_path is not None:
        _write_predictions(Path(predictions_path), predictions)
    return result


def _checked(metrics: list[str], labels: list[str] | str | None, kind: str) -> list[str]:
    """The metrics among `metrics` that score generated answers, after a check that this kind of data has them."""
    scores = [name for name in metrics if name not in (*ALWAYS, BITS_PER_BYTE, LABEL_ACCURACY)]
    metric_modules.check(scores)
    if LABEL_ACCURACY in metrics and not labels:
        raise DataError(
            f"The metric {LABEL_ACCURACY} needs labels to choose from, and evaluation.labels is not set. List the "
            "labels in it, or set evaluation.labels: auto."
        )
    if kind != "text" and BITS_PER_BYTE in metrics:
        raise DataError(
            f"The metric {BITS_PER_BYTE} is of plain text, and the evaluation data has prompts and answers. Write loss, or "
            "name the column of a text with data.text."
        )
    if kind == "text" and (scores or labels):
        counted = ", ".join([*scores, *([LABEL_ACCURACY] if labels else [])])
        raise DataError(
            f"The evaluation data is plain text, which has no right answers that {counted} could score. Set "
            "evaluation.metrics: [] and leave evaluation.labels out to measure the loss alone, or give data with "
            "prompts and completions."
        )
    return scores


def _references(rows: Dataset, rendering: Rendering, kind: str) -> list[str]:
    """The right answer of each row; empty if a row has none."""
    if kind == "completion":
        return ["" if answer is None else _after_thoughts(str(answer)) for answer in rows[rendering.completion]]
    return [_after_thoughts(rendering.question_and_answer(row, kind)[1]) for row in rows]


def _after_thoughts(answer: str) -> str:
    """The part of an answer after its reasoning, which is what metrics compare; all of it if there is no reasoning."""
    _, thoughts_end, conclusion = answer.rpartition(THOUGHT_ENDS)
    return conclusion.strip() if thoughts_end else answer


def _check_answered(references: list[str]) -> None:
    """Refuse rows without a right answer, which no model could get right."""
    unanswered = [number for number, reference in enumerate(references, start=1) if not reference.strip()]
    if unanswered:
        raise DataError(
            f"{len(unanswered)} of {len(references)} rows of the evaluation data have no right answer, the first of them "
            f"row {unanswered[0]}. Remove them, or set evaluation.metrics: [] to measure the loss alone."
        )


def _label_words(labels: list[str] | str, references: list[str]) -> list[str]:
    """The labels to choose from."""
    if isinstance(labels, list):
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise DataError(
                f"evaluation.labels is {labels}; expected at least two different labels to choose from, or auto for "
                "the different answers of the evaluation data."
            )
        return labels
    if labels != "auto":
        raise DataError(f"evaluation.labels is {labels!r}; expected a list of labels, or auto.")
    answers = sorted({reference for reference in references if reference.strip()})
    if 2 <= len(answers) <= _MOST_LABELS:
        return answers
    count = (
        f"{len(answers)} different answers"
        if answers[1:]
        else f"only one answer, {answers[0]!r}"
        if answers
        else "no answer"
    )
    raise DataError(
        f"evaluation.labels is auto, and the evaluation data has {count}; expected 2 to {_MOST_LABELS} labels to choose "
        "from. List the labels in evaluation.labels, or leave it out."
    )


def _check_references(references: list[str], labels: list[str]) -> None:
    for number, reference in enumerate(references, start=1):
        if reference in labels:
            continue
        alike = [label for label in labels if label.strip().casefold() == reference.strip().casefold()]
        hint = f" White space and case matter: {alike[0]!r} is a different label." if alike else ""
        raise DataError(
            f"The right answer of row {number} of the evaluation data is {reference!r}, which is not among the labels "
            f"{', '.join(map(repr, labels))}.{hint} Add it to evaluation.labels, correct the data, or name its values "
            "with data.label_names."
        )


def _chosen_label(reference: str, labels: list[str], scores: list[float]) -> dict[str, Any]:
    """The prediction among the labels; None if the model's probabilities are NaN."""
    chosen = None if any(map(math.isnan, scores)) else labels[scores.index(max(scores))]
    return {
        "label": chosen,
        "label_match": chosen == reference,
        "log_probabilities": {
            label: score if math.isfinite(score) else None for label, score in zip(labels, scores, strict=True)
        },
    }


def _write_predictions(path: Path, predictions: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as lines:
        for row in predictions:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own: int | list[int] | None = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*stop_tokens(tokenizer), *listed]))
