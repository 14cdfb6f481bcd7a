"""Describes a run's recipe, model and data, in its record and in a line on the terminal."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone

from transformers import PreTrainedModel

from sbft.data.format import FormatReport
from sbft.models.quantized import scales_bytes
from sbft.native.memory import device_name, model_bytes
from sbft.recipe import Recipe
from sbft.recipe.methods import METHODS
from sbft.runs.prepare import Prepared, evaluation_rows
from sbft.runs.record import RunRecord, git_commit, versions


def new_record(recipe: Recipe) -> RunRecord:
    """The record of an unfinished run, with everything known from its resolved recipe.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
    """
    training = recipe.training
    return RunRecord(
        method=recipe.method,
        model=recipe.model,
        dataset=recipe.data.train,
        seed=training["seed"],
        dtype=str(recipe.dtype),
        per_device_batch_size=training["per_device_train_batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        second_moment_half_life=recipe.optimizer.second_moment_half_life,
        learning_rate=float(training["learning_rate"]),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        git_commit=git_commit(),
    )


def describe_in_record(record: RunRecord, prepared: Prepared, model: PreTrainedModel) -> None:
    """Add to a record what is known once the model is loaded: its size, its device, and counts of the data."""
    recipe = prepared.recipe
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.numel() * parameter.element_size() for parameter in trainable]
    record.device = device_name(model.device)
    record.parameters = model.num_parameters()  # counts the two that share a byte of 4-bit weights
    record.trainable_parameters = sum(parameter.numel() for parameter in trainable)
    record.world_size = prepared.arguments.world_size
    # With gradient release, each gradient lives until its own update, so the largest one counts.
    record.memory["gradients"] = max(gradients) if recipe.optimizer.gradient_release else sum(gradients)
    quantized = METHODS[recipe.method].quantization is not None
    record.memory["weights"] = model_bytes(model) + (scales_bytes(model) if quantized else 0)
    rows = evaluation_rows(prepared.splits)
    # Without `unread`: these are names, not counts, and the user has seen them.
    counts = {name: count for name, count in asdict(prepared.report).items() if name != "unread"}
    record.data = {
        **counts,
        "dropped_overlap": prepared.splits.dropped_overlap,
        "evaluation_examples": None if rows is None else min(len(rows), recipe.evaluation.limit or len(rows)),
    }


def describe_data(prepared: Prepared) -> str:
    """A line about the training data: how much there is, and what was cut or left out."""
    return _describe_windows(prepared) if prepared.pretrains else _describe_examples(prepared)


def _describe_windows(prepared: Prepared) -> str:
    windows, held_out = len(prepared.examples), len(prepared.splits.validation or ())
    length, max_steps = prepared.recipe.data.max_length, prepared.arguments.max_steps
    steps = "" if max_steps < 0 else f"; {max_steps:,} steps"
    total = f"{windows:,} windows of {length:,} tokens, {windows * length:,} in all"
    return f"{total}{steps}; the loss is measured on {held_out:,} others"


def describe_replay(report: FormatReport) -> str:
    """How much of the training data is of an old kind, in words."""
    share = report.replay_tokens / report.tokens
    return f"{report.replay_examples} of them, {report.replay_tokens} tokens ({share:.1%}), replayed from older data"


def _describe_examples(prepared: Prepared) -> str:
    report, overlapping = prepared.report, prepared.splits.dropped_overlap
    clauses = [f"{report.examples} examples, {report.tokens} tokens, the longest {report.longest}"]
    if report.replay_examples:
        clauses.append(describe_replay(report))
    if report.packed_into is not None:
        clauses.append(f"packed into {report.packed_into} rows")
    if report.truncated:
        clauses.append(f"{report.truncated} cut off at data.max_length")
    if report.dropped:
        clauses.append(f"{report.dropped} left out, because data.max_length cuts off all that would be learned")
    if report.empty:
        clauses.append(f"{report.empty} left out, because they are empty")
    if report.unanswered:
        clauses.append(f"{report.unanswered} left out, because they have no assistant turn to learn")
    if report.divided:
        clauses.append(
            f"{report.divided} conversations became several examples each, as the chat template changes earlier answers "
            "in later turns"
        )
    if overlapping:
        clauses.append(f"{overlapping} left out, because the evaluation has the same question")
    return "; ".join(clauses)
