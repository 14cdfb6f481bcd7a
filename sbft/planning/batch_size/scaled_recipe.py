"""A recipe's settings at another batch size: the size, counts of steps, decays per step, and a learning rate to try."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sbft.recipe import Recipe
from sbft.tokens import beta_from_half_life, rescale_beta

RATE_PER_DOUBLING = 2 / 9
"""Growth of the best learning rate with each doubling of the batch, as a share of its value at batch size 1.

The authors of arXiv 2507.07101 trained GPT-3 XL with Adam at 6.7e-5 at batch size 1 and at 2e-4 at 512: three times as much
after nine doublings. The square-root rule gives 23 times (github.com/martin-marek/batch-size,
pretraining/runs/gpt3xl/gpt3xl_optimizer_comp.sh). In their grid search with a small model (utils/adam_1d.ipynb), the best
rate grew 2.4-fold up to batch size 16 and 4.2-fold up to 256, then fell.
"""


@dataclass
class BatchSettings:
    """Overrides of a recipe, with explanations."""

    overrides: dict[str, str]
    """Values by key, as `--set` takes them."""
    notes: list[str] = field(default_factory=list)
    """Sentences that explain the overrides."""


def batch_settings(recipe: Recipe, batch_size: int, tokens_per_example: float) -> BatchSettings:
    """What to override so that a recipe makes an update after every `batch_size` examples.

    Args:
        recipe: resolved.
        batch_size: examples per step.
        tokens_per_example: mean over the training data.
    """
    training = recipe.training
    accumulated = training["gradient_accumulation_steps"]
    before = training["per_device_train_batch_size"] * accumulated
    result = BatchSettings({"training.per_device_train_batch_size": str(batch_size)})
    if accumulated > 1:
        result.overrides["training.gradient_accumulation_steps"] = "1"
        result.notes.append(
            f"The recipe accumulates {accumulated} batches per step. Steps were timed without accumulation, as the paper "
            "advises, and the command turns it off."
        )
    _learning_rate(result, float(training["learning_rate"]), before, batch_size)
    _second_moment(result, recipe, before, batch_size, tokens_per_example)
    _counts_of_steps(result, recipe, before, batch_size)
    return result


def scaled_rate(rate: float, before: int, after: int) -> float:
    """A first guess of the learning rate at another batch size (in examples); see `RATE_PER_DOUBLING`."""
    return rate * _growth(after) / _growth(before)


def _growth(batch_size: int) -> float:
    return 1 + RATE_PER_DOUBLING * math.log2(batch_size)


def _learning_rate(result: BatchSettings, rate: float, before: int, after: int) -> None:
    if before == after:
        return
    hint = f"{scaled_rate(rate, before, after):.2g}"
    result.overrides["training.learning_rate"] = hint
    result.notes.append(
        f"The learning rate {hint}, scaled from {rate:g} at {_examples(before)} per step, is a first guess: tune it. In the "
        "paper's runs (arXiv 2507.07101), the best rate grew threefold from batch size 1 to 512: about with the logarithm of "
        "the batch size, not with its square root."
    )


def _second_moment(result: BatchSettings, recipe: Recipe, before: int, after: int, tokens_per_example: float) -> None:
    """Keep the half-life in tokens: where the recipe has a decay per step, scale it."""
    half_life, beta2 = recipe.optimizer.second_moment_half_life, recipe.optimizer.beta2
    if half_life is not None:
        tokens = after * tokens_per_example
        result.notes.append(
            f"The second moment's half-life stays {half_life:,.0f} tokens, and beta2 follows from it: "
            f"{beta_from_half_life(half_life, tokens):.4g} in a step of {tokens:,.0f} tokens, {_examples(after)} of "
            "average length."
        )
    elif beta2 and recipe.optimizer.schedule != "power" and before != after:
        new = f"{rescale_beta(beta2, before, after):.6g}"
        result.overrides["optimizer.beta2"] = new
        result.notes.append(
            f"The recipe's beta2 {beta2:g} is per step of {_examples(before)}; {new} keeps its half-life in tokens."
        )


def _counts_of_steps(result: BatchSettings, recipe: Recipe, before: int, after: int) -> None:
    """Scale counts of steps, so that they cover the same data with steps of the new size."""
    if before == after:
        return
    changed = []
    for name in ("max_steps", "warmup_steps"):
        steps = recipe.training.get(name) or 0
        if steps >= 1:  # a warm-up below 1 is a share, and no limit is -1
            new = math.ceil(steps * before / after)
            result.overrides[f"training.{name}"] = str(new)
            changed.append(f"{name} {new} instead of {steps:g}")
    if changed:
        result.notes.append(f"Counts of steps are changed to cover the same data: {' and '.join(changed)}.")


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count} examples"
