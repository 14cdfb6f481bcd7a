"""Whether a run fits the memory there is, by its predicted peak."""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import PreTrainedConfig

from sbft.native.sizes import gib
from sbft.planning.check.finding import Finding
from sbft.planning.memory.fit import SURE, does_it_fit
from sbft.planning.memory.predict import Prediction
from sbft.recipe import Recipe
from sbft.runs.failures import training_advice
from sbft.runs.prepare import Prepared


class Predict(Protocol):
    """How `sbft.planning.memory.predict.predict_recipe` is called."""

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
        """The peak of a run whose longest row has `longest` tokens, and none more than `labelled` labels.

        Rows have so many different lengths and numbers of labels; the widest batch may hold padding, or not. `config` is the
        model's, where the name does not say it.
        """


def fit(prepared: Prepared, prediction: Prediction, available_bytes: int) -> Finding | None:
    """What there is to say of a predicted peak beside the memory there is; None where there is room."""
    peak = prediction.peak_bytes
    verdict = does_it_fit(peak, available_bytes)
    if verdict == "yes":
        return None
    over = verdict == "no"
    sizes = f"{gib(peak)} are needed at the peak ({prediction.phase}), and {gib(available_bytes)} are available"
    known: dict[str, int | None] = {
        name: prediction.parts.get(name) for name in ("weights", "gradients", "optimizer_state")
    }
    advice = training_advice(prepared.recipe, known, peak, prepared.arguments.per_device_train_batch_size)
    return Finding(
        "does-not-fit" if over else "hardly-fits",
        "error" if over else "warning",
        "It will not fit into memory" if over else "It may not fit into memory",
        f"{sizes}{'' if over else f', less than {100 * (1 - SURE):.0f} % more, by which the prediction may be off'}.",
        advice.remedy,
    )
