"""How a run ends early: what its record says of it, and, when memory ran out, the switch that lowers it most."""

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
from sbft.runs.output_folder import RECIPE_FILE, RunFolder, is_fixed
from sbft.runs.ranks import DEFAULT_TIMEOUT_S, loss_of_a_rank
from sbft.runs.record import RunRecord
from sbft.training.checkpointing.checkpoints import find_checkpoint
from sbft.training.checkpointing.disk_errors import FULL_OR_READ_ONLY, refusal
from sbft.training.checkpointing.rehearsal import SavingError

logger = logging.getLogger(__name__)

_MESSAGES = ("can't allocate memory", "out of memory", "cannot allocate memory")


@dataclass
class Stage:
    """How far a run has come."""

    evaluating: bool = False
    within_training: bool = False
    """Whether what is evaluated is the model as training has it at some step."""
    trained: bool = False
    """Whether training is over."""
    kept: bool = False
    """Whether the trained model lies in the output folder."""


@contextmanager
def failures_recorded(recipe: Recipe, record: RunRecord, output: RunFolder) -> Iterator[Stage]:
    """Write into the record how the run ended early, and say what can be done about it.

    Yields:
        What the run says about how far it has come.
    """
    stage = Stage()
    try:
        yield stage
    except (Exception, KeyboardInterrupt) as error:
        told = _told(error, recipe, record, output, stage)
        if record.status == "unfinished":  # else it says more already
            record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        if is_out_of_memory(error):
            record.status = "oom"
            # That a model does not fit is a result too, even before there is anything to train.
            if not output.open and not output.resume:
                output.begin(recipe)
        kept = _what_is_kept(output) if stage.kept else ""
        if kept and isinstance(told, SbftError):
            told.args = (f"{told}{kept}",)
        record.error = str(told) if isinstance(told, SbftError) else f"{type(told).__name__}: {told}{kept}"
        # Before it has begun, a run leaves nothing behind.
        if output.open:
            _save_if_there_is_room(record, output)
        if told is error:
            raise
        raise told from error


def _told(error: BaseException, recipe: Recipe, record: RunRecord, output: RunFolder, stage: Stage) -> BaseException:
    """The error in sentences for the user; the error itself where sbft knows nothing to add."""
    if is_out_of_memory(error):
        advice = _out_of_memory(recipe, record, stage)
        return TrainingError(advice.text + _where_to_go_on(record, output, stage, advice))
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(signal_of(error), _interrupted(record, output, stage))
    if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
        error = DiskError(f"{error.filename or output.folder} could not be written: {refusal(error)}.")
    if isinstance(error, (DiskError, SavingError)):
        return type(error)(f"{error}{_where_to_go_on(record, output, stage)}")
    lost = loss_of_a_rank(error, recipe.training.get("ddp_timeout", DEFAULT_TIMEOUT_S))
    if lost is not None:
        return LostRankError(lost + _where_to_go_on(record, output, stage))
    return error


def _save_if_there_is_room(record: RunRecord, output: RunFolder) -> None:
    """What a full disk keeps the record from saying is said on the terminal."""
    try:
        output.save(record)
    except DiskError as error:
        logger.warning(str(error))


def _where_to_go_on(record: RunRecord, output: RunFolder, stage: Stage, advice: Advice | None = None) -> str:
    """The checkpoint that a failure in training has left, and whether what was advised can be set for the rest of it."""
    checkpoint = find_checkpoint(output.folder) if output.open and not stage.trained else None
    if checkpoint is None:
        return ""
    whole = f" The last checkpoint, {checkpoint}, is whole"
    if advice is None:
        return f"{whole}. To resume from it, type: {resume_command(record, output)}"
    key = advice.switch.partition("=")[0]
    if is_fixed(key):
        return f"{whole}, but {key} cannot be changed half-way: a run with another begins anew."
    return f"{whole}. To resume from it with that, type: {resume_command(record, output)} --set {advice.switch}"


def resume_command(record: RunRecord, output: RunFolder) -> str:
    """What to type to go on with a run from its last checkpoint."""
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
    return ", with no checkpoint to go on from. Type the command again to start over."


def _out_of_memory(recipe: Recipe, record: RunRecord, stage: Stage) -> Advice:
    if stage.evaluating:
        return evaluation_advice(
            recipe, "half-trained" if stage.within_training else "trained" if stage.trained else "untrained"
        )
    return training_advice(recipe, record.memory, record.peak_memory_bytes, record.per_device_batch_size)


@dataclass(frozen=True)
class Advice:
    """What to do where memory ran out, or will."""

    part: str
    """What takes the most of it, such as "the activations"."""
    switch: str
    """The setting that lowers the peak most: key=value, as `--set` takes it."""
    remedy: str
    """What to type, with what it costs."""
    text: str
    """The whole of it in sentences."""


def evaluation_advice(recipe: Recipe, which: Literal["untrained", "half-trained", "trained"]) -> Advice:
    """What to type when memory ran out while the model was measured.

    Args:
        recipe: the resolved recipe.
        which: the model before, within or after training; measuring the untrained one can be left out.
    """
    settings = recipe.evaluation
    size = settings.batch_size
    switch = (
        f"evaluation.batch_size={size // 2}" if size > 1 else f"data.max_length={max(recipe.data.max_length // 2, 1)}"
    )
    others = ["--set evaluation.limit=N to evaluate on fewer examples"]
    if which == "untrained":
        others.append("--set evaluation.before=false to skip this evaluation")
    text = (
        f"Out of memory while the {which} model was evaluated, {size} examples at once. To lower the peak most, add "
        f"--set {switch}. Or add {', or '.join(others)}."
    )
    return Advice("the activations", switch, f"--set {switch}", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory, of the device or of the machine, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in _MESSAGES)


def training_advice(
    recipe: Recipe, memory: dict[str, int | None], peak_bytes: int | None, batch_size: int
) -> Advice:
    """Which part was largest when memory ran out in training, and what to type.

    Args:
        recipe: the resolved recipe.
        memory: the parts of a run record: weights, gradients, optimizer_state, in bytes.
        peak_bytes: the highest that was seen before memory ran out; None if unknown.
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
        "the weights": "dtype=bfloat16" if recipe.dtype == "float32" else "",
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
    if largest == "the weights" and not switches[largest]:
        remedy += " or take a smaller model"
    text = (
        f"Out of memory. The largest part: {largest} (seen before it ran out: {figures}). "
        f"To lower the peak most, add {remedy}."
    )
    return Advice(largest, switch, remedy, text)
