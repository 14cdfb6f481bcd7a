"""How a run ends early: what its record says of it, and, when memory ran out, the switch that lowers it most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sbft.errors import SbftError, TrainingError
from sbft.recipe import Recipe
from sbft.training.output import RunFolder
from sbft.training.record import RunRecord

_MESSAGES = ("can't allocate memory", "out of memory", "cannot allocate memory")


@contextmanager
def failures_recorded(recipe: Recipe, record: RunRecord, output: RunFolder) -> Iterator[None]:
    """Write into the record how the run ended early, and say what can be done about it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        told: BaseException = error
        if is_out_of_memory(error):
            record.status = "oom"
            told = TrainingError(advice(recipe, record.memory, record.peak_memory_bytes, record.per_device_batch_size))
            # That a model does not fit is a result too, even before there is anything to train.
            if not output.open and not output.resume:
                output.begin(recipe)
        elif isinstance(error, KeyboardInterrupt):
            told = TrainingError("Stopped by Ctrl-C outside the training loop. Type the command again to start over.")
        record.error = str(told) if isinstance(told, SbftError) else f"{type(told).__name__}: {told}"
        # Before it has begun, a run leaves nothing behind.
        if output.open:
            output.save(record)
        if told is error:
            raise
        raise told from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory, of the device or of the machine, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in _MESSAGES)


def advice(recipe: Recipe, memory: dict[str, int | None], peak_bytes: int | None, batch_size: int) -> str:
    """Sentences that say which part was largest, and what to type.

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
    if recipe.training.get("gradient_checkpointing"):
        activations = f"data.max_length={max(recipe.data.max_length // 2, 1)} (it cuts longer examples)"
    else:
        activations = "training.gradient_checkpointing=true (a third slower)"
    if batch_size > 1:
        activations = "training.per_device_train_batch_size=1 (training is as good at batch size 1)"
    can_release = recipe.training.get("gradient_accumulation_steps", 1) == 1
    gradients = "optimizer.gradient_release=true" if can_release else "method=sbft"
    switches = {
        "the weights": "dtype=bfloat16" if recipe.dtype == "float32" else "",
        "the gradients": "" if recipe.optimizer.gradient_release or recipe.lora else gradients,
        "the optimizer's state": "" if recipe.method == "sbft" else "method=sbft",
        "the activations": activations,
    }
    largest = max(parts, key=lambda part: parts[part])
    figures = ", ".join(f"{part} {size / 2**30:.2f} GiB" for part, size in parts.items())
    switch = next(
        (switches[part] for part in sorted(parts, key=lambda part: -parts[part]) if switches[part]), activations
    )
    smaller = " or take a smaller model" if largest == "the weights" and not switches[largest] else ""
    return (
        f"Out of memory. Largest were {largest} (as far as seen before it ran out: {figures}). "
        f"What lowers it most: add --set {switch}{smaller}."
    )
