"""The suites of the paper's experiments: valid, searched alike, and consistent in what they share."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.lab import experiments, figures
from sbft.bench.suite import load_suite, uneven_grids
from sbft.bench.suite_check import recipe_problems
from sbft.bench.suite_runs import Run
from sbft.runs.record import RunRecord
from sbft.training.batches.batch_schedule import BatchSchedule
from tests.unit.bench import report_cases


@pytest.fixture(scope="module", params=experiments.BUDGETS)
def suites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The file of each experiment."""
    folder, paths = tmp_path_factory.mktemp("suites"), {}
    for name in experiments.BUDGETS[request.param].experiments:
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(experiments.suite(name, experiments.BUDGETS[request.param])))
    return paths


def test_they_are_valid_and_every_method_is_searched_as_widely_as_the_others(suites: dict[str, Path]) -> None:
    for path in suites.values():
        suite = load_suite(path)
        assert recipe_problems(suite) == []
        assert uneven_grids(suite) is None


def test_what_two_have_in_common_is_the_same_run(suites: dict[str, Path]) -> None:
    seen: dict[str, Any] = {}
    for path in suites.values():
        for name, method in yaml.safe_load(path.read_text())["methods"].items():
            assert seen.setdefault(name, method) == method, name
    assert len(seen) < sum(len(yaml.safe_load(path.read_text())["methods"]) for path in suites.values())


@pytest.mark.parametrize("budget", experiments.BUDGETS)
def test_the_batch_that_doubles_reaches_its_largest_with_a_quarter_of_the_examples_left(budget: str) -> None:
    content = experiments.suite("schedule", experiments.BUDGETS[budget])
    settings = content["methods"]["adam-doubling-to-64"]["set"]
    schedule = BatchSchedule(1, settings["batch_schedule.doubling_examples"], settings["batch_schedule.largest"])
    windows = content["tasks"]["corpus"]["data"]["train_tokens"] // content["tasks"]["corpus"]["data"]["max_length"]
    sizes = {schedule.size(seen) for seen in schedule.seen(schedule.steps(windows))[:-1]}
    assert sizes == {1, 2, 4, 8, 16, 32, 64}
    assert schedule.size(windows * 74 // 100) == 32 and schedule.size(windows * 76 // 100) == 64


@pytest.mark.parametrize("budget", experiments.BUDGETS.values(), ids=experiments.BUDGETS)
def test_second_moments_reach_back_a_small_part_of_the_run(budget: experiments.Budget) -> None:
    assert 1 / 20 < budget.half_life / budget.train_tokens < 1 / 9
    assert budget.half_life * math.log2(1 / 0.95) == pytest.approx(budget.reference_batch * 512, rel=1e-4)


def test_tables_and_figures_of_finished_of_failed_and_of_missing_runs(tmp_path: Path) -> None:
    """Made-up losses: 3 plus the distance in decades to a rate of 3e-3; Adam at the largest batch fails."""
    budget = replace(experiments.BUDGETS["short"], batches=(1, 8, 64), experiments=experiments.ALL, seeds=(1, 2))
    (tmp_path / "suites").mkdir()
    for name in ("batch-size", "robustness", "rounding", "half-life", "momentum"):
        (tmp_path / "suites" / f"{name}.yaml").write_text(yaml.safe_dump(experiments.suite(name, budget)))
        one = load_suite(tmp_path / "suites" / f"{name}.yaml")

        def result(run: Run, one: Any = one) -> RunRecord:
            loss = 3 + abs(math.log10(run.learning_rate / 3e-3)) + run.seed / 100
            fails = run.variant == "adam-64" or (run.variant, run.seed) == ("adam-8", 2)
            failed = {"status": "error", "error": "No finite loss."} if fails else {}
            return report_cases.record(one, run, loss=loss, **failed)

        if name != "half-life":
            report_cases.search(one, tmp_path, result)
        if name not in ("half-life", "momentum"):
            report_cases.test(one, tmp_path, result)
    figures.draw(tmp_path, tmp_path / "out")
    tables = (tmp_path / "out" / "tables.md").read_text()
    row = next(line for line in tables.splitlines() if line.startswith("| sgd |"))
    # The grid at batch size 1 begins at 1e-1, a decade and a half away; the figures are those of seeds 1 and 2.
    assert row.startswith("| sgd | 4.538 ± 0.005 (0.1, lowest of its grid) |")
    adam = next(line for line in tables.splitlines() if line.startswith("| adam |"))
    assert adam.endswith("| failed |") and " 3.010 (1 of 2 seeds) (0.003, lowest" in adam
    momentum = next(line for line in tables.splitlines() if line.startswith("| sgd-momentum |"))
    assert momentum.startswith("| sgd-momentum | 5.000 (of the search) (0.3, lowest of its grid) |")
    fixed = next(line for line in tables.splitlines() if line.startswith("| adam-beta2-fixed |"))
    assert fixed.split("|")[3] == adam.split("|")[3]  # at batch size 8, the two are the same
    # 1.4826 * 0.015 / sqrt(1.5): 0.015 is the distance from seed 0 to the mean of seeds 1 and 2.
    assert "varies by 0.018 (standard deviation" in tables.splitlines()[0]
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"batch-size", "robustness", "rounding", "half-life", "momentum"}
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == drawn
