"""Throughput by batch size: which size to try next, when to stop, and which one to choose. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

_DOUBLINGS_WITHOUT_GAIN = 2
"""A single one could be noise, or a size that suits the kernels badly."""


@dataclass(frozen=True)
class Timed:
    """Time and memory of training steps at one batch size."""

    batch_size: int
    """Examples per step, on one device."""
    tokens_per_step: float
    """Mean, without padding."""
    step_s: float
    """Median duration of a step."""
    steps: int
    """Number of steps timed."""
    peak_bytes: int
    """Peak memory of the training loop."""
    baseline_bytes: int
    """Memory in use when the loop began, with the model loaded."""
    fixed_bytes: int
    """Optimizer state, and gradients kept for a whole step: neither grows with the batch."""
    flops_per_step: float | None = None
    """Floating point operations that a step requires, where known."""

    @property
    def tokens_per_s(self) -> float:
        """Mean tokens of a step divided by its median duration."""
        return self.tokens_per_step / self.step_s


Reason = Literal["no gain", "largest", "out of memory", "over the limit", "would not fit"]


@dataclass(frozen=True)
class Ending:
    """Why no larger size was tried."""

    reason: Reason
    batch_size: int | None = None
    """The size that did not fit into memory."""
    needed_bytes: int | None = None
    """Memory that this size took ("over the limit"), or would take by estimate ("would not fit")."""


@dataclass(frozen=True)
class Curve:
    """The sizes that ran, smallest first, and why the search ended."""

    timed: list[Timed]
    ending: Ending

    def best(self) -> Timed:
        """The size with the highest throughput."""
        return max(self.timed, key=lambda timed: timed.tokens_per_s)

    def smallest_at(self, share: float) -> Timed:
        """The smallest size that reached this share of the best throughput.

        Raises:
            ValueError: if no size ran.
        """
        enough = share * self.best().tokens_per_s
        return next(timed for timed in self.timed if timed.tokens_per_s >= enough)


def search(
    run: Callable[[int], Timed | None],
    *,
    share: float,
    largest: int | None = None,
    limit_bytes: int | None = None,
) -> Curve:
    """Run batch sizes 1, 2, 4, ... until larger ones gain nothing or do not fit.

    Args:
        run: times steps of a size; returns None if memory ran out.
        share: of the best throughput, above 0 and at most 1, that counts as full. The search ends after two doublings
            in a row without gain: `share` times the better of the two is no more than the best before them.
        largest: largest size to try.
        limit_bytes: limit of the peak memory. A size that is expected to exceed it is not run.
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
    """Peak memory of a larger size by linear extrapolation; 0 while no size ran.

    The slope is that between the last two sizes, or that between the first and the last if it is steeper: a size may have
    reused memory that an earlier one left behind. (Between small sizes, a resident peak is mostly noise.)
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
    return share * max(timed.tokens_per_s for timed in latest) <= max(timed.tokens_per_s for timed in before)
