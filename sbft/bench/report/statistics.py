"""Means with their standard errors, paired differences, the Pareto front, and smoothed curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    standard_error: float | None = None
    """None where it cannot be estimated."""
    count: int = 1
    """Number of seeds or items."""
    over: Literal["seeds", "items"] = "seeds"


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """The mean of one value per seed. Its error is the sample standard deviation divided by the square root of their number.

    None without values.
    """
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def standard_error(share: float, items: int) -> float:
    """Standard error of a share measured on `items` independent items."""
    return math.sqrt(share * (1.0 - share) / items)


def of_share(share: float, items: int | None) -> Estimate:
    """The share of items that a single seed got right, with its standard error."""
    if not items:
        return Estimate(share)
    return Estimate(share, standard_error(share, items), items, "items")


@dataclass(frozen=True)
class Pooled:
    """The standard deviation between seeds that several rows have in common."""

    deviation: float
    degrees_of_freedom: int

    def difference(self, first: Estimate, second: Estimate) -> Estimate:
        """The first mean less the second, with the standard error that the pooled deviation gives it."""
        error = self.deviation * math.sqrt(1 / first.count + 1 / second.count)
        return Estimate(first.mean - second.mean, error, min(first.count, second.count))


def pooled(rows: Sequence[Estimate]) -> Pooled | None:
    """Pool the variance between seeds over rows; None where no row has two seeds.

    Two seeds alone tell a deviation badly: theirs is often far too small by chance. The rows are taken to vary alike.
    """
    told = [row for row in rows if row.over == "seeds" and row.standard_error is not None and row.count > 1]
    freedom = sum(row.count - 1 for row in told)
    if not freedom:
        return None
    squares = sum((row.count - 1) * row.count * (row.standard_error or 0.0) ** 2 for row in told)
    return Pooled(math.sqrt(squares / freedom), freedom)


def with_items(value: Estimate, items: int) -> Estimate:
    """A share over seeds that were all measured on the same items: their standard error is added to that of the seeds."""
    error = math.hypot(value.standard_error or 0.0, standard_error(value.mean, items))
    return Estimate(value.mean, error, value.count, value.over)


def paired_by_seed(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have. The same seed means the same data in the same order."""
    return over_seeds([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired_by_item(right: Sequence[bool], baseline: Sequence[bool]) -> Estimate | None:
    """The mean difference over the items; both lists must have the same items in the same order."""
    differences = [float(a) - float(b) for a, b in zip(right, baseline, strict=True)]
    if not differences:
        return None
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Estimate(fmean(differences), error, len(differences), "items")


def pareto_front(costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool = True) -> list[int]:
    """The indices that no other beats. One beats another if it costs no more, is worth no less, and differs in either.

    Returns:
        The indices in ascending order of cost.
    """
    worth = [value if higher_is_better else -value for value in values]

    def beaten(index: int) -> bool:
        return any(
            costs[other] <= costs[index]
            and worth[other] >= worth[index]
            and (costs[other] < costs[index] or worth[other] > worth[index])
            for other in range(len(costs))
        )

    return sorted((index for index in range(len(costs)) if not beaten(index)), key=lambda index: costs[index])


def smoothed(places: Sequence[float], values: Sequence[float], share: float) -> list[float]:
    """Each value replaced by the mean of those near it.

    Args:
        places: in ascending order, such as the tokens seen.
        values: one for each place.
        share: width of the window as a share of the whole length. Points farther apart than this are unchanged.
    """
    if not places:
        return []
    half = share * (places[-1] - places[0]) / 2
    return [
        fmean(value for other, value in zip(places, values, strict=True) if abs(other - place) <= half)
        for place in places
    ]
