"""Means with their standard errors, paired differences, the Pareto front, and smoothed curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it may be off by chance."""

    mean: float
    standard_error: float | None = None
    """None where there is nothing to tell it from."""
    count: int = 1
    """Seeds or items that it is the mean of."""
    over: Literal["seeds", "items"] = "seeds"


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """The mean of one value a seed, with the sample standard deviation over the root of their number; None of none."""
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def standard_error(share: float, items: int) -> float:
    """Standard error of a share measured on `items` independent items."""
    return math.sqrt(share * (1.0 - share) / items)


def of_share(share: float, items: int | None) -> Estimate:
    """A share of items that one seed got right."""
    if not items:
        return Estimate(share)
    return Estimate(share, standard_error(share, items), items, "items")


def paired_by_seed(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have: same data in the same order."""
    return over_seeds([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired_by_item(right: Sequence[bool], baseline: Sequence[bool]) -> Estimate | None:
    """The mean difference over the items that both have answered, in one order."""
    differences = [float(a) - float(b) for a, b in zip(right, baseline, strict=True)]
    if not differences:
        return None
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Estimate(fmean(differences), error, len(differences), "items")


def pareto_front(costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool = True) -> list[int]:
    """Indices of those that no other beats: none costs no more and is worth no less, with one of both strictly.

    Returns:
        The indices by rising cost.
    """
    worth = [value if higher_is_better else -value for value in values]

    def beaten(one: int) -> bool:
        return any(
            costs[other] <= costs[one]
            and worth[other] >= worth[one]
            and (costs[other] < costs[one] or worth[other] > worth[one])
            for other in range(len(costs))
        )

    return sorted((one for one in range(len(costs)) if not beaten(one)), key=lambda one: costs[one])


def smoothed(places: Sequence[float], values: Sequence[float], share: float) -> list[float]:
    """Each value replaced by the mean of those near it.

    Args:
        places: rising, such as the tokens seen.
        values: one for each place.
        share: width of the window as a share of the whole length; points further apart than that stay as they are.
    """
    if not places:
        return []
    half = share * (places[-1] - places[0]) / 2
    return [
        fmean(value for other, value in zip(places, values, strict=True) if abs(other - place) <= half)
        for place in places
    ]
