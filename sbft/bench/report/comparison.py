"""The results of a suite, finished or not: one row for each variant on each task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sbft.bench.rate_choice import RateChoice, choose_rate
from sbft.bench.report import statistics
from sbft.bench.report.statistics import Estimate
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, groups, prefix, read_process, read_run, run_folder, searches
from sbft.metrics import LOWER_IS_BETTER
from sbft.recipe.methods import METHODS
from sbft.runs.record import Forgetting, RunRecord, forgetting

_SHARES_OF_ITEMS = frozenset({"exact_match", "label_accuracy", "accuracy"})
# The keys of a metric's outcome in a line of predictions.jsonl.
_OUTCOMES = {"exact_match": "exact_match", "label_accuracy": "label_match"}


@dataclass(frozen=True)
class SuiteRun:
    """A run of the suite, with its record if it is finished."""

    run: Run
    folder: Path
    record: RunRecord | None
    process: dict[str, Any]
    """What is known about its process; empty if nothing is."""

    @property
    def ok(self) -> RunRecord | None:
        """The record, if the run succeeded."""
        return self.record if self.record is not None and self.record.status == "ok" else None

    @property
    def failure(self) -> str | None:
        """Why it failed, such as `oom: ...`; None if it did not."""
        if self.record is None or self.record.status == "ok":
            return None
        return f"{self.record.status}: {self.record.error}"

    def failure_of(self, metric: str) -> str | None:
        """Why the run has no such metric: it failed, or the metric is not finite."""
        # A record has None where a number was not finite.
        if self.ok is not None and self.ok.metrics.get(metric) is None:
            return f"its {metric.replace('_', ' ')} is not finite"
        return self.failure

    @property
    def at_once(self) -> int | None:
        """How many runs its runner made at the same time, where known."""
        return self.process.get("at_once")

    @property
    def cores(self) -> int | None:
        """How many cores the machine has, where known: older runs did not record it."""
        return self.process.get("cores")

    def outcomes(self, metric: str) -> list[tuple[str, str, bool]] | None:
        """Prompt, reference and whether the answer was right, for each item; None where this was not kept."""
        key = _OUTCOMES.get(metric)
        if self.ok is None or self.ok.predictions is None or key is None:
            return None
        path = self.folder / Path(self.ok.predictions).name  # never in another folder, whatever the record says
        if not path.is_file():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(key in line for line in lines):
            return None
        return [(line["prompt"], line["reference"], bool(line[key])) for line in lines]


@dataclass(frozen=True)
class Validation:
    """The result of the validation runs at one learning rate."""

    learning_rate: float
    runs: int
    """Number of validation runs, one for each search seed."""
    done: int
    """Number of runs with a score."""
    score: Estimate | None
    """None if a run failed, or none is done."""
    failure: str | None
    """Why the first failed run failed."""


@dataclass(frozen=True)
class Row:
    """One variant on one task."""

    model: str
    task: str
    variant: str
    method: str
    metric: str
    """The metric that decides the learning rate."""
    choice: RateChoice
    taken_from: str | None
    """The variant whose learning rate this one uses, if it has no grid of its own."""
    searched: list[SuiteRun]
    """Its validation runs."""
    tested: list[SuiteRun]
    """Its test runs; none while the learning rate is not decided."""

    @property
    def records(self) -> list[RunRecord]:
        """Records of the test runs that succeeded."""
        return [made.ok for made in self.tested if made.ok is not None]

    @property
    def is_share(self) -> bool:
        """Whether the metric is a share of items, higher being better."""
        return self.metric not in LOWER_IS_BETTER

    @property
    def is_adapter(self) -> bool:
        """Whether it trains an adapter, not the model's own weights."""
        return METHODS[self.method].lora_defaults is not None

    @property
    def is_on_gpu(self) -> bool:
        """Whether its memory is a GPU's, not the process's."""
        return any(record.memory_kind == "cuda_allocated" for record in self.records)

    @property
    def score(self) -> Estimate | None:
        """The metric, estimated over the seeds, or over the items of a single seed."""
        return _estimate(self.metric, self.records)

    @property
    def failed(self) -> dict[int, str]:
        """Why a test run has no score, by seed."""
        return {made.run.seed: why for made in self.tested if (why := made.failure_of(self.metric)) is not None}

    @property
    def seeds_short(self) -> str:
        """A remark such as ` (2 of 3 seeds)` if only some seeds have a score, else an empty string."""
        scored, all_seeds = len(self.values(self.metric)), len(self.tested)
        return f" ({scored} of {all_seeds} seeds)" if 0 < scored < all_seeds else ""

    def validations(self) -> list[Validation]:
        """Validation results of each learning rate that was searched, in ascending order."""
        validations = []
        for rate in sorted({made.run.learning_rate for made in self.searched}):
            runs = [made for made in self.searched if made.run.learning_rate == rate]
            failure = next((why for made in runs if (why := made.failure_of(self.metric)) is not None), None)
            done = [made.ok for made in runs if made.ok is not None]
            score = None if failure else _estimate(self.metric, done)
            validations.append(Validation(rate, len(runs), len(done), score, failure))
        return validations

    @property
    def loss(self) -> Estimate | None:
        """The loss on the evaluation data, estimated over the seeds."""
        return statistics.over_seeds(list(self.values("loss").values()))

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed, for seeds where it is a finite number."""
        return {
            made.run.seed: value
            for made in self.tested
            if made.ok is not None and (value := made.ok.metrics.get(metric)) is not None
        }

    @property
    def forgetting(self) -> dict[str, list[Forgetting]]:
        """What each test run has forgotten, by the names of the watched data."""
        found: dict[str, list[Forgetting]] = {}
        for record in self.records:
            for name, change in forgetting(record).items():
                found.setdefault(name, []).append(change)
        return found

    def mean(self, figure: Callable[[RunRecord], float | None]) -> float | None:
        """Mean of a quantity over the seeds that have it."""
        values = [value for record in self.records if (value := figure(record)) is not None]
        return fmean(values) if values else None

    @property
    def tokens_per_s(self) -> float | None:
        """The most of the test runs; of one that stood still for a while it is far too few."""
        return max((one.tokens_per_s for one in self.records if one.tokens_per_s is not None), default=None)

    def median(self, figure: Callable[[RunRecord], float | None]) -> float | None:
        """Median of a figure over the test runs that have it: other load slows single runs, so that a mean would follow it."""
        values = [value for record in self.records if (value := figure(record)) is not None]
        return median(values) if values else None

    @property
    def total_s(self) -> float | None:
        """Seconds of the fastest test run, from reading the data to the last measurement."""
        return min((record.total_s for record in self.records if record.total_s is not None), default=None)

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory of the training loop."""
        return self.mean(lambda record: record.peak_memory_bytes)

    @property
    def shortfall(self) -> str | None:
        """Why there are no results; None where there are."""
        if self.records:
            return None
        failures = [made.failure for made in self.tested if made.failure]
        if failures:
            return failures[0]
        if self.choice.rate is None and self.choice.decided:
            failed = [made.failure for made in self.searched if made.failure]
            return f"no learning rate worked; {failed[0]}" if failed else self.choice.reason
        return "not run yet" if self.choice.rate is not None else f"not run yet: {self.choice.reason}"


@dataclass(frozen=True)
class Comparison:
    """A suite and its rows."""

    suite: Suite
    folder: Path
    rows: list[Row]

    def groups(self) -> list[tuple[str, list[Row]]]:
        """A title and the rows for each model and task; the model is named where there are several."""
        titled = []
        for model, task in groups(self.suite):
            title = task if len(self.suite.models) == 1 else f"{task}, {prefix(self.suite, model).rstrip('/')}"
            titled.append((title, [row for row in self.rows if (row.model, row.task) == (model, task)]))
        return titled

    def made(self) -> list[SuiteRun]:
        """All runs whose learning rate is decided, in the order of the rows."""
        return [made for row in self.rows for made in (*row.searched, *row.tested)]

    def difference(self, row: Row) -> Estimate | None:
        """The score's difference to the baseline: paired by seed, or by item where both have only one seed in common.

        None for the baseline itself, and where either has no score.
        """
        other = next(
            other
            for other in self.rows
            if (other.model, other.task, other.variant) == (row.model, row.task, self.suite.baseline)
        )
        if other is row:
            return None
        by_seed = statistics.paired_by_seed(row.values(row.metric), other.values(row.metric))
        if by_seed is None or by_seed.count > 1:
            return by_seed
        return _paired_by_item(row, other) or by_seed


def compare(suite: Suite, folder: Path) -> Comparison:
    """Read the runs of a suite that there are so far."""
    rows = []
    for model, task in groups(suite):
        for variant in suite.ordered_methods():
            choice = choose_rate(suite, folder, model, task, variant)
            tests = [] if choice.rate is None else suite.seeds
            rows.append(
                Row(
                    model=model,
                    task=task,
                    variant=variant,
                    method=suite.method_of(variant),
                    metric=suite.score_name(task),
                    choice=choice,
                    taken_from=suite.methods[variant].learning_rates_from,
                    searched=[_made(folder, run) for run in searches(suite, model, task, variant)],
                    tested=[
                        _made(folder, Run(model, task, variant, choice.rate, seed, "test", prefix(suite, model)))
                        for seed in tests
                        if choice.rate is not None
                    ],
                )
            )
    return Comparison(suite, folder, rows)


def _estimate(metric: str, records: list[RunRecord]) -> Estimate | None:
    """Estimate a metric over the seeds; over the items where there is one seed and the metric is a share of items."""
    measured = [record for record in records if record.metrics.get(metric) is not None]
    if len(measured) == 1 and metric in _SHARES_OF_ITEMS:
        return statistics.of_share(measured[0].metrics[metric], measured[0].data.get("evaluation_examples"))
    return statistics.over_seeds([record.metrics[metric] for record in measured])


def _made(folder: Path, run: Run) -> SuiteRun:
    return SuiteRun(run, run_folder(folder, run), read_run(folder, run), read_process(folder, run))


def _paired_by_item(row: Row, other: Row) -> Estimate | None:
    """Estimate the difference over the items, if both were asked the same ones."""
    common = row.values(row.metric).keys() & other.values(row.metric).keys()
    seed = next(iter(common))
    answers = [next(made for made in one.tested if made.run.seed == seed).outcomes(row.metric) for one in (row, other)]
    mine, its = answers
    if mine is None or its is None or [item[:2] for item in mine] != [item[:2] for item in its]:
        return None
    return statistics.paired_by_item([item[2] for item in mine], [item[2] for item in its])
