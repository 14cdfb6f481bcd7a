"""The results of a suite as far as there are any: one row for each variant on each task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sbft.bench.rate_choice import RateChoice, choose_rate
from sbft.bench.report import statistics
from sbft.bench.report.statistics import Estimate
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, groups, prefix, read_process, read_run, run_folder, searches
from sbft.recipe.methods import METHODS
from sbft.runs.record import RunRecord

LOSSES = frozenset({"loss", "perplexity"})
_SHARES_OF_ITEMS = frozenset({"exact_match", "label_accuracy", "accuracy"})
# What a line of predictions.jsonl calls the outcome of a metric.
_OUTCOMES = {"exact_match": "exact_match", "label_accuracy": "label_match"}


@dataclass(frozen=True)
class Made:
    """A run of the suite, with its record if it is finished."""

    run: Run
    folder: Path
    record: RunRecord | None
    process: dict[str, Any]
    """What is known of its process; empty if nothing is."""

    @property
    def ok(self) -> RunRecord | None:
        """The record, if the run reached its end."""
        return self.record if self.record is not None and self.record.status == "ok" else None

    @property
    def failure(self) -> str | None:
        """Why it did not, such as `oom: ...`."""
        if self.record is None or self.record.status == "ok":
            return None
        return f"{self.record.status}: {self.record.error}"

    def failure_of(self, metric: str) -> str | None:
        """Why the run has no such figure: it failed, or came to no finite number."""
        # A record has None where a number was not finite.
        if self.ok is not None and self.ok.metrics.get(metric) is None:
            return f"its {metric.replace('_', ' ')} is no finite number"
        return self.failure

    @property
    def at_once(self) -> int | None:
        """How many runs its runner made at a time, where that is known."""
        return self.process.get("at_once")

    @property
    def cores(self) -> int | None:
        """How many the machine has, where that is known: older runs did not write it down."""
        return self.process.get("cores")

    def outcomes(self, metric: str) -> list[tuple[str, str, bool]] | None:
        """Prompt, reference and whether the answer was right, for each item; None where that was not kept."""
        key = _OUTCOMES.get(metric)
        if self.ok is None or self.ok.predictions is None or key is None:
            return None
        path = self.folder / Path(self.ok.predictions).name  # whatever the record says, no other folder's
        if not path.is_file():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(key in line for line in lines):
            return None
        return [(line["prompt"], line["reference"], bool(line[key])) for line in lines]


@dataclass(frozen=True)
class Validation:
    """What the validation runs at one learning rate came to."""

    learning_rate: float
    runs: int
    """How many there are, one for each search seed."""
    done: int
    """How many of them have a score."""
    score: Estimate | None
    """None if one failed, or none is done."""
    failure: str | None
    """Why the first that failed did."""


@dataclass(frozen=True)
class Row:
    """One variant on one task."""

    model: str
    task: str
    variant: str
    method: str
    metric: str
    """The metric that decides."""
    choice: RateChoice
    taken_from: str | None
    """The variant whose learning rate this one takes."""
    searched: list[Made]
    """Its validation runs."""
    tested: list[Made]
    """Its test runs; none while the learning rate is not decided."""

    @property
    def records(self) -> list[RunRecord]:
        """Of the test runs that reached their end."""
        return [made.ok for made in self.tested if made.ok is not None]

    @property
    def is_share(self) -> bool:
        """Whether the metric is a share of items, higher being better."""
        return self.metric not in LOSSES

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model's own weights."""
        return METHODS[self.method].lora_defaults is not None

    @property
    def is_on_gpu(self) -> bool:
        """Whether its memory is that of a GPU, and not of the process."""
        return any(record.memory_kind == "cuda_allocated" for record in self.records)

    @property
    def score(self) -> Estimate | None:
        """The metric over the seeds, or over the items of a single seed."""
        return _estimate(self.metric, self.records)

    @property
    def failed(self) -> dict[int, str]:
        """By seed, why a test run has no score."""
        return {made.run.seed: why for made in self.tested if (why := made.failure_of(self.metric)) is not None}

    @property
    def seeds_short(self) -> str:
        """Such as ` (2 of 3 seeds)`, behind a figure that is not of all seeds; empty if it is, or there is none."""
        scored, all_seeds = len(self.values(self.metric)), len(self.tested)
        return f" ({scored} of {all_seeds} seeds)" if 0 < scored < all_seeds else ""

    def validations(self) -> list[Validation]:
        """Of each learning rate that was searched, by rising rate."""
        found = []
        for rate in sorted({made.run.learning_rate for made in self.searched}):
            runs = [made for made in self.searched if made.run.learning_rate == rate]
            failure = next((why for made in runs if (why := made.failure_of(self.metric)) is not None), None)
            done = [made.ok for made in runs if made.ok is not None]
            score = None if failure else _estimate(self.metric, done)
            found.append(Validation(rate, len(runs), len(done), score, failure))
        return found

    @property
    def loss(self) -> Estimate | None:
        """The loss on the evaluation data, over the seeds."""
        return statistics.over_seeds(list(self.values("loss").values()))

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed, as far as it is a number."""
        return {
            made.run.seed: value
            for made in self.tested
            if made.ok is not None and (value := made.ok.metrics.get(metric)) is not None
        }

    def mean(self, figure: Callable[[RunRecord], float | None]) -> float | None:
        """Mean of a figure over the seeds that have it."""
        values = [value for record in self.records if (value := figure(record)) is not None]
        return fmean(values) if values else None

    @property
    def _at_rate(self) -> list[RunRecord]:
        """The runs that trained at the row's learning rate: a validation run does as a test run does, and counts too."""
        searched = [made.ok for made in self.searched if made.run.learning_rate == self.choice.rate]
        return [one for one in (*self.records, *searched) if one is not None]

    @property
    def timed(self) -> RunRecord | None:
        """The run that the time of a step is read off: the one at the row's learning rate with the shortest median step.

        Other load on a machine only ever slows a run.
        """
        found = [one for one in self._at_rate if one.step_s.get("median") is not None]
        return min(found, key=lambda one: one.step_s["median"] or math.inf, default=None)

    @property
    def tokens_per_s(self) -> float | None:
        """The most of the runs at the row's learning rate; of one that stood still for a while it is far too few."""
        return max((one.tokens_per_s for one in self._at_rate if one.tokens_per_s is not None), default=None)

    def speed(self, figure: Callable[[RunRecord], float | None]) -> float | None:
        """A figure of the run that the time of a step is read off."""
        return None if self.timed is None else figure(self.timed)

    @property
    def total_s(self) -> float | None:
        """Seconds of the quickest test run, from reading the data to the last measurement."""
        return min((one.total_s for one in self.records if one.total_s is not None), default=None)

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory of the training loop."""
        return self.mean(lambda record: record.peak_memory_bytes)

    @property
    def shortfall(self) -> str | None:
        """Why there are no figures; None where there are."""
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

    def made(self) -> list[Made]:
        """All runs that are decided on, in the order of the rows."""
        return [made for row in self.rows for made in (*row.searched, *row.tested)]

    def difference(self, row: Row) -> Estimate | None:
        """The score's difference to the baseline: paired by seed, or by item where one seed is common to both.

        None for the baseline itself, and where one of the two has no score.
        """
        other = next(
            one for one in self.rows if (one.model, one.task, one.variant) == (row.model, row.task, self.suite.baseline)
        )
        if other is row:
            return None
        by_seed = statistics.paired_by_seed(row.values(row.metric), other.values(row.metric))
        if by_seed is None or by_seed.count > 1:
            return by_seed
        return _paired_by_item(row, other) or by_seed


def compare(suite: Suite, folder: Path) -> Comparison:
    """Read what there is of a suite's runs."""
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
    """A metric over the seeds; of a single one that is a share of items, over the items."""
    measured = [record for record in records if record.metrics.get(metric) is not None]
    if len(measured) == 1 and metric in _SHARES_OF_ITEMS:
        return statistics.of_share(measured[0].metrics[metric], measured[0].data.get("evaluation_examples"))
    return statistics.over_seeds([record.metrics[metric] for record in measured])


def _made(folder: Path, run: Run) -> Made:
    return Made(run, run_folder(folder, run), read_run(folder, run), read_process(folder, run))


def _paired_by_item(row: Row, other: Row) -> Estimate | None:
    """Over the items that both have answered, if they were asked the same."""
    common = row.values(row.metric).keys() & other.values(row.metric).keys()
    seed = next(iter(common))
    answers = [next(made for made in one.tested if made.run.seed == seed).outcomes(row.metric) for one in (row, other)]
    mine, its = answers
    if mine is None or its is None or [item[:2] for item in mine] != [item[:2] for item in its]:
        return None
    return statistics.paired_by_item([item[2] for item in mine], [item[2] for item in its])
