"""Whether a run's predicted peak fits into the available memory."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedConfig

from sbft.native.sizes import gib
from sbft.planning.check.finding import Finding
from sbft.planning.memory.predict import Prediction
from sbft.planning.memory.usable import SURE, does_it_fit
from sbft.recipe import Recipe
from sbft.runs.failures import training_advice
from sbft.runs.prepare import Prepared


class Predict(Protocol):
    """The signature of `sbft.planning.memory.predict.predict_recipe` as it is called here."""

    def __call__(
        self,
        recipe: Recipe,
        *,
        longest: int,
        padded: bool,
        labelled: int,
        lengths: int,
        label_counts: int,
        device: torch.device | str | None = None,
        config: PreTrainedConfig | None = None,
    ) -> Prediction:
        """Predict the peak of a run; see `RowSizes` for what describes its rows.

        Args:
            recipe: resolved.
            longest: tokens of the longest row.
            padded: whether the widest batch may hold padding.
            labelled: the most labels in a row.
            lengths: number of different row lengths.
            label_counts: number of different label counts.
            device: device to train on; where this process would train when None.
            config: of the model; read from where the recipe says when None.
        """


def fit(prepared: Prepared, prediction: Prediction, available_bytes: int) -> Finding | None:
    """A finding if the predicted peak exceeds the available memory or comes close to it, else None."""
    peak = prediction.peak_bytes
    verdict = does_it_fit(peak, available_bytes)
    if verdict == "yes":
        return None
    over = verdict == "no"
    margin = f"; the margin is below the {100 * (1 - SURE):.0f} % by which the prediction may be off"
    parts: dict[str, int | None] = {
        name: prediction.parts.get(name) for name in ("weights", "gradients", "optimizer_state")
    }
    advice = training_advice(prepared.recipe, parts, peak, prepared.arguments.per_device_train_batch_size)
    return Finding(
        "does-not-fit" if over else "hardly-fits",
        "error" if over else "warning",
        "It will not fit into memory" if over else "It may not fit into memory",
        f"{gib(peak)} are needed at the peak ({prediction.phase}), and {gib(available_bytes)} are available"
        f"{'' if over else margin}.",
        advice.remedy,
    )
