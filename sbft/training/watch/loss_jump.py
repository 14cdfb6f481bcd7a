"""Detects a loss that jumps, and names the likely cause."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from sbft.optim.base import TokenOptimizer
from sbft.tokens import FINE_TUNING_HALF_LIFE, beta_from_half_life, half_life_from_beta

# A loss has jumped if the median of the recent steps is `_Z_SCORE` spreads above the median of the steps before. At batch size
# 1 a step's loss is that of one example, so neither a single loss nor a mean can be compared with the others.
_RECENT_STEPS, _RECENT_STEPS_AT_MOST, _RECENT_TOKENS = 16, 64, 400
_USUAL_STEPS, _USUAL_STEPS_AT_LEAST = 256, 32
_Z_SCORE = 3.0
# At the beginning there are only the first losses to compare with, and the loss of a model that guesses, the logarithm of the
# vocabulary's size. Fine-tuning begins well below it. SmolLM2-135M with Adafactor at a learning rate of 1e-2 rises from 0.5 of
# it to a median of 0.83 in 16 steps.
_FIRST_STEPS = 4
_LEARNED_BELOW, _GUESSING_ABOVE = 0.6, 0.8


@dataclass(frozen=True)
class Jump:
    """A loss that has jumped: at which step, to what value, and what it was compared with."""

    step: int
    loss: float
    compared_with: str


class LossWatch:
    """Detects a loss that rises far above its usual range and stays there.

    The median of the last 16 steps or more (as many as hold 400 tokens, at most 64) is compared with the median of up to 256
    steps before. The spread is estimated from the median absolute deviation and from the 95th percentile, as for a normal
    distribution, and the larger one counts. The percentile matters for short answers, whose losses are mostly near zero and
    sometimes large: without it these would look like jumps. After few steps the spread is less certain, and the threshold is
    higher.

    Args:
        guess: the loss of a model that guesses, the logarithm of the vocabulary's size; None if it has no vocabulary.
    """

    def __init__(self, guess: float | None = None) -> None:
        self._guess = guess
        self._steps: deque[tuple[int, float, int]] = deque(maxlen=_USUAL_STEPS + _RECENT_STEPS_AT_MOST)
        self._first: list[float] = []

    @property
    def first_loss(self) -> float | None:
        """Median of the first losses; None before there are enough."""
        return float(np.median(self._first)) if len(self._first) == _FIRST_STEPS else None

    @property
    def recent_loss(self) -> float:
        """Median of the recent losses; there has to be one."""
        return float(np.median([loss for _, loss, _ in self._steps][-self._recent_count() :]))

    @property
    def tokens_per_step(self) -> float:
        """Mean over the steps that are kept."""
        return sum(tokens for *_, tokens in self._steps) / max(len(self._steps), 1)

    def add(self, step: int, loss: float, tokens: int) -> None:
        """Add the loss of one step and its number of tokens; a loss that is not finite is ignored."""
        if not math.isfinite(loss):
            return
        self._steps.append((step, loss, tokens))
        if len(self._first) < _FIRST_STEPS:
            self._first.append(loss)

    def jump(self) -> Jump | None:
        """The jump in the recent steps, if there is one."""
        if len(self._steps) < _RECENT_STEPS:
            return None
        count = self._recent_count()
        losses = np.array([loss for _, loss, _ in self._steps])
        usual, recent = losses[:-count], losses[-count:]
        current = float(np.median(recent))
        steps = [step for step, *_ in self._steps][-count:]
        if (
            self._guess is not None
            and min(self._first) < _LEARNED_BELOW * self._guess < _GUESSING_ABOVE * self._guess < current
        ):
            comparison = f"the run began at {min(self._first):.2f}, and guessing among all tokens costs {self._guess:.2f}"
            return Jump(steps[0], current, comparison)
        if len(usual) < _USUAL_STEPS_AT_LEAST:
            return None
        middle = float(np.median(usual))
        deviation = 1.4826 * float(np.median(np.abs(usual - middle)))
        upper = (float(np.quantile(usual, 0.95)) - middle) / 1.645
        spread = max(deviation, upper, 0.05 * abs(middle), 0.02)
        threshold = _Z_SCORE * (1 + 32 / len(usual))
        z_score = (current - middle) / spread
        if z_score < threshold:
            return None
        onset = int(np.argmax(recent > middle + threshold * spread))
        comparison = f"{middle:.2f} was usual in the {len(usual)} steps before, robust z-score {z_score:.1f}"
        return Jump(steps[onset], float(np.median(recent[onset:])), comparison)

    def _recent_count(self) -> int:
        count = tokens = 0
        for *_, of_step in reversed(self._steps):
            if count >= _RECENT_STEPS and tokens >= _RECENT_TOKENS or count == _RECENT_STEPS_AT_MOST:
                break
            count, tokens = count + 1, tokens + of_step
        return count


def message_of_jump(jump: Jump, optimizer: torch.optim.Optimizer, rate: float, tokens_per_step: float) -> str:
    """What has jumped, the likely cause, and what to set; `rate` is the peak learning rate."""
    slower = f"lower learning_rate, which is {rate:g}, to {rate / 3:.1g}"
    beta2 = _fixed_beta2(optimizer)
    half_life = half_life_from_beta(beta2, tokens_per_step) if beta2 else math.inf
    if half_life < FINE_TUNING_HALF_LIFE / 10:
        if isinstance(optimizer, TokenOptimizer):
            fix = (
                f"Leave beta2 out and set second_moment_half_life to {FINE_TUNING_HALF_LIFE:.0f} "
                f"(in a recipe, optimizer: {{second_moment_half_life: {FINE_TUNING_HALF_LIFE:.0f}}})"
            )
        else:
            scaled = beta_from_half_life(FINE_TUNING_HALF_LIFE, tokens_per_step)
            fix = f"Set adam_beta2 to {scaled:.5f} (in a recipe, optimizer: {{beta2: {scaled:.5f}}})"
        cause = (
            f"Likely cause: beta2 {beta2:g} at {tokens_per_step:.0f} tokens per step forgets half of the squared gradients "
            f"within {half_life:.0f} tokens, so that the step size follows single examples. {fix}; or {slower}."
        )
    else:
        cause = f"Likely cause: the learning rate is too high. Try again, and {slower}, or add warmup_steps."
    return (
        f"The loss has jumped: from step {jump.step} on its median is {jump.loss:.2f} ({jump.compared_with}). {cause} "
        f"If this rate has worked on similar data, look at the examples from step {jump.step} on: damaged examples, or "
        "another kind of data, look the same."
    )


def _fixed_beta2(optimizer: torch.optim.Optimizer) -> float | None:
    """The decay factor of the second moment per step; None if it is measured in tokens or does not exist."""
    group = optimizer.param_groups[0]
    if group.get("schedule") == "power":  # there beta2 is an exponent
        return None
    beta2 = group["betas"][1] if "betas" in group else group.get("beta2")
    return None if beta2 is None else float(beta2)
