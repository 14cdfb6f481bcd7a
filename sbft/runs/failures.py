"""Failures of a run: what its record says, and what the user can do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from sbft.errors import DiskError, Interrupted, LostRankError, SbftError, TrainingError, signal_of
from sbft.native.sizes import gib
from sbft.recipe import Recipe
from sbft.recipe.methods import METHODS
from sbft.recipe.settings import OPTIMIZERS
from sbft.runs.output_folder import RECIPE_FILE, RunFolder, is_fixed
from sbft.runs.ranks import DEFAULT_TIMEOUT_S, loss_of_a_rank
from sbft.runs.record import RunRecord
from sbft.training.checkpointing.checkpoints import find_checkpoint
from sbft.training.checkpointing.disk_errors import FULL_OR_READ_ONLY, refusal
from sbft.training.checkpointing.trial_save import SavingError

logger = logging.getLogger(__name__)

_MESSAGES = ("can't allocate memory", "out of memory", "cannot allocate memory")


@dataclass
class Stage:
    """How far a run has progressed."""

    evaluating: bool = False
    within_training: bool = False
    """Whether the evaluation is one during training."""
    trained: bool = False
    """Whether training is over."""
    kept: bool = False
    """Whether the trained model is in the output folder."""


@contextmanager
def failures_recorded(recipe: Recipe, record: RunRecord, output: RunFolder) -> Iterator[Stage]:
    """Record how the run failed, and raise an error that says what to do about it.

    Yields:
        How far the run has progressed; the run itself keeps this up to date.
    """
    stage = Stage()
    try:
        yield stage
    except (Exception, KeyboardInterrupt) as error:
        shown = _for_the_user(error, recipe, record, output, stage)
        if record.status == "unfinished":  # otherwise it is more specific already
            record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        if is_out_of_memory(error):
            record.status = "oom"
            # A model that does not fit is a result too, even if it failed before training.
            if not output.open and not output.resume:
                output.begin(recipe)
        kept = _what_is_kept(output) if stage.kept else ""
        if kept and isinstance(shown, SbftError):
            shown.args = (f"{shown}{kept}",)
        record.error = str(shown) if isinstance(shown, SbftError) else f"{type(shown).__name__}: {shown}{kept}"
        # A run that has not started leaves nothing behind.
        if output.open:
            _save_if_there_is_room(record, output)
        if shown is error:
            raise
        raise shown from error


def _for_the_user(error: BaseException, recipe: Recipe, record: RunRecord, output: RunFolder, stage: Stage) -> BaseException:
    """The error in sentences for the user; the error itself if sbft has nothing to add."""
    if is_out_of_memory(error):
        advice = _out_of_memory(recipe, record, stage)
        return TrainingError(advice.text + _where_to_resume(record, output, stage, advice))
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(signal_of(error), _interrupted(record, output, stage))
    if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
        error = DiskError(f"{error.filename or output.folder} could not be written: {refusal(error)}.")
    if isinstance(error, (DiskError, SavingError)):
        return type(error)(f"{error}{_where_to_resume(record, output, stage)}")
    lost = loss_of_a_rank(error, recipe.training.get("ddp_timeout", DEFAULT_TIMEOUT_S))
    if lost is not None:
        return LostRankError(lost + _where_to_resume(record, output, stage))
    return error


def _save_if_there_is_room(record: RunRecord, output: RunFolder) -> None:
    """Save the record; if the disk is full, warn on the terminal instead."""
    try:
        output.save(record)
    except DiskError as error:
        logger.warning(str(error))


def _where_to_resume(record: RunRecord, output: RunFolder, stage: Stage, advice: Advice | None = None) -> str:
    """The checkpoint that a failed training left, and whether the advised setting can be changed when it is resumed."""
    checkpoint = find_checkpoint(output.folder) if output.open and not stage.trained else None
    if checkpoint is None:
        return ""
    intact = f" The last checkpoint, {checkpoint}, is intact"
    if advice is None:
        return f"{intact}. To resume from it, type: {resume_command(record, output)}"
    key = advice.switch.partition("=")[0]
    if is_fixed(key):
        return f"{intact}, but {key} cannot be changed in a resumed run: start a new one."
    return f"{intact}. To resume from it with that, type: {resume_command(record, output)} --set {advice.switch}"


def resume_command(record: RunRecord, output: RunFolder) -> str:
    """What to type to resume a run from its last checkpoint."""
    ranks = f" --num-processes {record.world_size}" if record.world_size > 1 else ""
    return f"sbft train {output.folder}/{RECIPE_FILE} --resume{ranks}"


def _what_is_kept(output: RunFolder) -> str:
    return f" The trained model is in {output.folder}. To measure it, type: sbft eval {output.folder}"


def _interrupted(record: RunRecord, output: RunFolder, stage: Stage) -> str:
    """What follows "Stopped by Ctrl-C"."""
    if stage.trained:
        return " after training, before all was measured."
    checkpoint = find_checkpoint(output.folder) if output.open else None
    if checkpoint is not None:
        return f"; the last checkpoint is in {checkpoint}. To resume, type: {resume_command(record, output)}"
    return " before the first checkpoint. Type the command again to start over."


def _out_of_memory(recipe: Recipe, record: RunRecord, stage: Stage) -> Advice:
    if stage.evaluating:
        return evaluation_advice(
            recipe, "half-trained" if stage.within_training else "trained" if stage.trained else "untrained"
        )
    return training_advice(recipe, record.memory, record.peak_memory_bytes, record.per_device_batch_size)


@dataclass(frozen=True)
class Advice:
    """What to do if memory ran out, or will."""

    part: str
    """What takes most of the memory, such as "the activations"."""
    switch: str
    """The setting that lowers the peak most: key=value, as `--set` takes it."""
    remedy: str
    """What to type, with what it costs."""
    text: str
    """All of this in sentences."""


def evaluation_advice(recipe: Recipe, which: Literal["untrained", "half-trained", "trained"]) -> Advice:
    """What to type if memory ran out while the model was evaluated.

    Args:
        recipe: the resolved recipe.
        which: the model before, during or after training; evaluating the untrained one can be skipped.
    """
    settings = recipe.evaluation
    size = settings.batch_size
    switch = (
        f"evaluation.batch_size={size // 2}" if size > 1 else f"data.max_length={max(recipe.data.max_length // 2, 1)}"
    )
    alternatives = ["--set evaluation.limit=N to evaluate on fewer examples"]
    if which == "untrained":
        alternatives.append("--set evaluation.before=false to skip this evaluation")
    text = (
        f"Out of memory while the {which} model was evaluated, {size} examples at a time. To lower the peak most, add "
        f"--set {switch}. Or add {', or '.join(alternatives)}."
    )
    return Advice("the activations", switch, f"--set {switch}", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error means that memory ran out, on the device or on the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in _MESSAGES)


def _smaller_weights(recipe: Recipe) -> str:
    """The setting that lets a recipe's weights take less; empty if there is none."""
    if recipe.dtype == "float32":
        return "weights=bfloat16" if recipe.weights == "float32" else "dtype=bfloat16"
    alone = recipe.lora is None and recipe.distributed is None
    trains_on_grids = alone and METHODS[recipe.method].optimizer in OPTIMIZERS
    return "weights=int8" if trains_on_grids and recipe.weights in (None, "bfloat16", "int12") else ""


def training_advice(
    recipe: Recipe, memory: dict[str, int | None], peak_bytes: int | None, batch_size: int
) -> Advice:
    """What to type if memory ran out in training: what lowers the largest part.

    Args:
        recipe: the resolved recipe.
        memory: bytes of weights, gradients and optimizer_state, as a run record has them.
        peak_bytes: the highest peak seen before memory ran out; None if unknown.
        batch_size: examples in the step that failed, on this device.
    """
    parts = {
        "the weights": memory.get("weights") or 0,
        "the gradients": memory.get("gradients") or 0,
        "the optimizer's state": memory.get("optimizer_state") or 0,
    }
    known = sum(parts.values())
    parts["the activations"] = max((peak_bytes or 0) - known, 0)
    if batch_size > 1:
        activations, cost = "training.per_device_train_batch_size=1", "training is as good at batch size 1"
    elif recipe.training.get("gradient_checkpointing"):
        activations, cost = f"data.max_length={max(recipe.data.max_length // 2, 1)}", "it cuts longer examples"
    else:
        activations, cost = "training.gradient_checkpointing=true", "a third slower"
    accumulates = recipe.training.get("gradient_accumulation_steps", 1) > 1
    clips = float(recipe.training.get("max_grad_norm") or 0) > 0
    can_release = "gradient_release" in METHODS[recipe.method].settings and not accumulates and not clips
    gradients = "optimizer.gradient_release=true" if can_release else "method=sbft"
    switches = {
        "the weights": _smaller_weights(recipe),
        "the gradients": "" if recipe.optimizer.gradient_release or recipe.lora else gradients,
        "the optimizer's state": "" if recipe.method == "sbft" else "method=sbft",
        "the activations": activations,
    }
    largest = max(parts, key=lambda part: parts[part])
    figures = ", ".join(f"{part} {gib(size)}" for part, size in parts.items())
    switch = next(
        (switches[part] for part in sorted(parts, key=lambda part: -parts[part]) if switches[part]), activations
    )
    remedy = f"--set {switch}"
    if switch == activations:
        remedy += f" ({cost})"
    if switch == "weights=int8":
        remedy += " (half the memory of bfloat16)"
    if largest == "the weights" and not switches[largest]:
        remedy += " or choose a smaller model"
    text = (
        f"Out of memory. The largest part: {largest} (seen before it ran out: {figures}). "
        f"To lower the peak most, add {remedy}."
    )
    return Advice(largest, switch, remedy, text)
