"""Means, standard errors, paired differences, the Pareto front and smoothing, against slow float oracles."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbft.bench.report import formats
from sbft.bench.report.statistics import (
    Estimate,
    Pooled,
    of_share,
    over_seeds,
    paired_by_item,
    paired_by_seed,
    pareto_front,
    pooled,
    smoothed,
    standard_error,
    with_items,
)

_numbers = st.floats(-1e3, 1e3, allow_subnormal=False)


def oracle(values: list[float]) -> tuple[float, float]:
    """Mean and standard error by their textbook formulas."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance) / math.sqrt(len(values))


@given(st.lists(_numbers, min_size=2, max_size=9))
def test_over_seeds_it_is_the_sample_standard_deviation_over_the_root_of_their_number(values):
    found = over_seeds(values)
    mean, error = oracle(values)
    assert found is not None and found.count == len(values)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.standard_error == pytest.approx(error, abs=1e-9)


def test_by_hand():
    # Deviations -2, 0, 2: a variance of 4, and 2 / sqrt(3).
    assert over_seeds([80.0, 82.0, 84.0]) == Estimate(82.0, pytest.approx(2 / math.sqrt(3)), 3)
    assert over_seeds([0.5]) == Estimate(0.5, None, 1)
    assert over_seeds([]) is None


def test_of_a_share_it_is_the_binomial_one():
    assert standard_error(0.9, 100) == pytest.approx(0.03)
    assert standard_error(0.0, 50) == 0.0
    assert standard_error(0.5, 4) == math.sqrt(0.25 / 4)
    assert of_share(0.9, 100) == Estimate(0.9, pytest.approx(0.03), 100, "items")
    assert of_share(0.9, None).standard_error is None


@given(st.dictionaries(st.integers(0, 9), st.tuples(_numbers, _numbers), min_size=2))
def test_a_paired_difference_has_the_error_of_the_differences(pairs):
    found = paired_by_seed({s: a for s, (a, _) in pairs.items()}, {s: b for s, (_, b) in pairs.items()})
    mean, error = oracle([a - b for a, b in pairs.values()])
    assert found is not None
    assert (found.mean, found.standard_error) == (pytest.approx(mean, abs=1e-9), pytest.approx(error, abs=1e-9))


def test_only_seeds_that_both_have_are_paired():
    assert paired_by_seed({0: 1.0, 1: 3.0, 7: 99.0}, {1: 1.0, 0: 0.0, 8: -99.0}) == Estimate(1.5, 0.5, 2)
    assert paired_by_seed({0: 1.0}, {1: 1.0}) is None


def test_items_are_paired_one_by_one():
    mine, its = [True, True, False, True], [True, False, False, False]
    mean, error = oracle([0.0, 1.0, 0.0, 1.0])
    assert paired_by_item(mine, its) == Estimate(mean, pytest.approx(error), 4, "items")
    with pytest.raises(ValueError):
        paired_by_item(mine, its[:3])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8), st.booleans())
def test_the_front_holds_those_that_no_other_beats(points, higher):
    costs, values = [float(c) for c, _ in points], [float(v) for _, v in points]
    chosen = pareto_front(costs, values, higher_is_better=higher)
    sign = 1 if higher else -1
    for one in range(len(points)):
        better = [
            other
            for other in range(len(points))
            if (costs[other], -sign * values[other]) != (costs[one], -sign * values[one])
            and costs[other] <= costs[one]
            and sign * values[other] >= sign * values[one]
        ]
        assert (one in chosen) == (not better)
    assert [costs[one] for one in chosen] == sorted(costs[one] for one in chosen)


def test_smoothing_averages_what_lies_in_the_window_and_nothing_else():
    places = [0.0, 1.0, 2.0, 3.0, 10.0]
    assert smoothed(places, [1.0, 2.0, 3.0, 7.0, 5.0], 0.2) == [1.5, 2.0, 4.0, 5.0, 5.0]
    assert smoothed(places, [1.0, 2.0, 3.0, 7.0, 5.0], 0.1) == [1.0, 2.0, 3.0, 7.0, 5.0]
    assert smoothed([], [], 0.1) == [] and smoothed([5.0], [2.0], 0.1) == [2.0]


def test_figures_are_written_for_people():
    assert formats.estimate(Estimate(0.8726, 0.0123), 100) == "87.3 ± 1.2"
    assert formats.estimate(Estimate(0.021, 0.008), 100, signed=True) == "+2.1 ± 0.8"
    assert formats.estimate(Estimate(-0.021), 100, signed=True) == "−2.1"
    assert formats.estimate(Estimate(-0.0001), 100, signed=True) == "0.0"
    assert formats.estimate(None) == "" and formats.gibibytes(None) == ""
    assert formats.mebibytes(256 << 20) == "256" and formats.mebibytes(1 << 20) == "1.0"
    assert formats.superscript(12) == "¹²"


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([("Some CPU, 1 core", 2), ("Some CPU, 1 core", 2)], "Some CPU, 2 cores, 1 thread per run"),
        ([("Some CPU, 1 core", None)], "Some CPU, 1 thread per run"),
        ([("Some CPU, 1 core", None), ("Some CPU, 16 cores", 16)], "Some CPU, 16 cores, 1 / 16 threads per run"),
        ([("NVIDIA H100 80GB HBM3 x 2", 16), (None, 16)], "NVIDIA H100 80GB HBM3 x 2"),
        ([("A, 2 cores", 4), ("B, 1 core", 1)], "A, 4 cores, 2 threads per run / B, 1 core, 1 thread per run"),
    ],
)
def test_a_machine_is_told_with_its_cores_and_the_threads_of_a_run(runs, told):
    assert formats.machines(runs) == told


def test_the_variance_between_seeds_is_pooled_over_rows():
    rows = [over_seeds([1.0, 3.0]), over_seeds([5.0, 5.0]), over_seeds([2.0])]
    found = pooled([row for row in rows if row is not None])
    # Sums of squares 2 and 0, with one degree of freedom each; a single seed adds nothing.
    assert found == Pooled(1.0, 2)
    difference = found.difference(Estimate(5.0, 0.0, 2), Estimate(2.0, None, 1))
    assert difference.mean == 3.0 and difference.standard_error == pytest.approx(math.sqrt(1 / 2 + 1))
    assert pooled([Estimate(2.0)]) is None
    assert pooled([Estimate(0.5, 0.1, 100, "items")]) is None


def test_seeds_on_the_same_items_share_the_error_of_these_items():
    found = with_items(Estimate(0.1, 0.03, 3), 225)  # sqrt(0.1 * 0.9 / 225) = 0.02
    assert found.mean == 0.1 and found.standard_error == pytest.approx(math.hypot(0.03, 0.02))
