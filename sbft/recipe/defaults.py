"""Completes a recipe with its method's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbft.grid.formats import DTYPES, on_grids
from sbft.recipe.methods import METHODS
from sbft.recipe.pretraining import has_budget
from sbft.recipe.settings import OPTIMIZERS, RIVALS

EXCLUSIVE = (*RIVALS, ("training", "max_steps", "num_train_epochs"))
"""A section and two of its keys that set the same thing. Giving one drops the default of the other."""


def complete(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a recipe, completed with its method's defaults."""
    method = METHODS[content.get("method", "sbft")]
    whole = method.defaults()
    for section, first, second in EXCLUSIVE:
        values = content.get(section) or {}
        for key, rival in ((first, second), (second, first)):
            unset = values.get(key) is None or (key == "max_steps" and values[key] == -1)
            if not unset:
                whole[section].pop(rival, None)
    if has_budget(content):
        whole["training"].pop("num_train_epochs", None)
    merged = {**whole, **content}
    for section in whole:
        values = {key: value for key, value in (content.get(section) or {}).items() if value is not None}
        merged[section] = {**whole[section], **values}
    if merged.get("weights") is None and method.weights is not None:
        merged["weights"] = method.weights
    weights = merged.get("weights")
    if merged.get("dtype") is None:
        # Weights on a grid compute in bfloat16, whatever the method.
        merged["dtype"] = weights if weights in DTYPES else "bfloat16" if on_grids(weights) else method.dtype
    unset = (content.get("optimizer") or {}).get("stochastic_rounding") is None
    if unset and on_grids(weights) and method.optimizer in OPTIMIZERS:
        merged["optimizer"]["stochastic_rounding"] = True  # rounded to nearest, weights on a grid do not train
    if merged["dtype"] == "float32" and "stochastic_rounding" in merged["optimizer"]:
        merged["optimizer"]["stochastic_rounding"] = False  # float32 weights are not rounded
    if merged["optimizer"].get("schedule") == "power":
        merged["optimizer"].pop("second_moment_half_life", None)
    if not merged.get("output_dir"):
        data = merged["data"]["train"].removeprefix("generated:").removeprefix("builtin:").rstrip("/")
        merged["output_dir"] = f"runs/{Path(data).stem}-{merged.get('method', 'sbft')}"
    return merged
