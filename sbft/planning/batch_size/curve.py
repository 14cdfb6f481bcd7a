"""Throughput by batch size: which size comes next, when to stop, and which one to choose. Nothing is run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

_DOUBLINGS_WITHOUT_GAIN = 2
"""One could be noise, or a size that the kernels happen to dislike."""


@dataclass(frozen=True)
class Timed:
    """What training steps of one batch size took."""

    batch_size: int
    """Examples in a step, on one device."""
    tokens_per_step: float
    """Padding aside."""
    step_s: float
    """Median."""
    steps: int
    """That were timed."""
    peak_bytes: int
    """Highest memory of the training loop."""
    baseline_bytes: int
    """Held when the loop began, the model loaded."""
    fixed_bytes: int
    """Optimizer state and gradients, as far as they do not grow with the batch."""
    flops_per_step: float | None = None
    """Floating point operations that the step needs, where they are known."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its median time."""
        return self.tokens_per_step / self.step_s


Reason = Literal["no gain", "largest", "out of memory", "over the limit", "would not fit"]


@dataclass(frozen=True)
class Ending:
    """Why no larger size follows."""

    reason: Reason
    batch_size: int | None = None
    """The size that memory did not suffice for."""
    needed_bytes: int | None = None
    """What this size took ("over the limit"), or would take about ("would not fit")."""


@dataclass(frozen=True)
class Curve:
    """The sizes that ran, smallest first, and why they end."""

    timed: list[Timed]
    ending: Ending

    def best(self) -> Timed:
        """The size of the highest throughput."""
        return max(self.timed, key=lambda one: one.tokens_per_s)

    def smallest_at(self, share: float) -> Timed:
        """The smallest size that ran at this share of the best throughput seen; it need not be on the rising side.

        Raises:
            ValueError: if no size ran.
        """
        enough = share * self.best().tokens_per_s
        return next(one for one in self.timed if one.tokens_per_s >= enough)


def search(
    run: Callable[[int], Timed | None],
    *,
    share: float,
    largest: int | None = None,
    limit_bytes: int | None = None,
) -> Curve:
    """Run batch sizes 1, 2, 4, ... until larger ones bring no more, or cannot be had.

    Args:
        run: makes steps of a size; None if memory ran out.
        share: of the best throughput, above 0 and at most 1, that counts as all of it. Two doublings in a row that
            together bring less than this tolerance end the search: `share` of their better one is below the best
            before them.
        largest: size that is not passed.
        limit_bytes: peak memory that is not to be passed: a size that is foreseen to is not run.
    """
    timed: list[Timed] = []
    size = 1
    while largest is None or size <= largest:
        if limit_bytes is not None and (needed := expected_peak_bytes(timed, size)) > limit_bytes:
            return Curve(timed, Ending("would not fit", size, needed))
        result = run(size)
        if result is None:
            return Curve(timed, Ending("out of memory", size))
        if limit_bytes is not None and result.peak_bytes > limit_bytes:
            return Curve(timed, Ending("over the limit", size, result.peak_bytes))
        timed.append(result)
        if _without_gain(timed, share):
            return Curve(timed, Ending("no gain"))
        size *= 2
    return Curve(timed, Ending("largest"))


def expected_peak_bytes(timed: Sequence[Timed], batch_size: int) -> int:
    """Peak memory that a larger size will need, as a straight line has it; 0 while no size ran.

    The line rises as from the last size but one to the last, or as from the first to the last if that is steeper: a size
    may have found memory that was there already. (Between small sizes, a resident peak is mostly noise.)
    """
    if not timed:
        return 0
    first, last = timed[0], timed[-1]
    if first is last:
        slope = max(last.peak_bytes - last.baseline_bytes - last.fixed_bytes, 0) / last.batch_size
    else:
        slope = max(_rise(timed[-2], last), _rise(first, last), 0.0)
    return round(last.peak_bytes + slope * (batch_size - last.batch_size))


def _rise(smaller: Timed, larger: Timed) -> float:
    return (larger.peak_bytes - smaller.peak_bytes) / (larger.batch_size - smaller.batch_size)


def _without_gain(timed: Sequence[Timed], share: float) -> bool:
    before, latest = timed[:-_DOUBLINGS_WITHOUT_GAIN], timed[-_DOUBLINGS_WITHOUT_GAIN:]
    if not before:
        return False
    return share * max(one.tokens_per_s for one in latest) <= max(one.tokens_per_s for one in before)
