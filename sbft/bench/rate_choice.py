"""The choice of each row's learning rate by its validation runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from sbft.bench.suite import Suite
from sbft.bench.suite_runs import read_run, searches
from sbft.metrics import LOWER_IS_BETTER
from sbft.runs.record import RunRecord


@dataclass(frozen=True)
class TriedRate:
    """The validation result of one learning rate."""

    learning_rate: float
    score: float | None = None
    """Mean of the task's first metric over the search seeds; None if a run failed or is not made yet."""
    loss: float | None = None
    """Mean validation loss over the search seeds; None in the same cases."""
    done: int = 0
    """Number of runs made."""
    failure: str | None = None
    """Why the first failed run failed."""


@dataclass(frozen=True)
class RateChoice:
    """The learning rate of one row, and how it was chosen."""

    rate: float | None
    """None if not decided yet, or if every rate failed."""
    tried: list[TriedRate]
    """Each rate of the grid; empty where there was nothing to choose."""
    reason: str
    """A sentence on why it is this rate, or why there is none."""
    decided: bool = True
    """Whether all validation runs have been made."""

    @property
    def edge(self) -> Literal["lowest", "highest"] | None:
        """Which end of its grid the rate is at, if at either: a better rate may be outside."""
        rates = sorted(tried.learning_rate for tried in self.tried)
        if len(rates) < 2 or self.rate not in (rates[0], rates[-1]):
            return None
        return "lowest" if self.rate == rates[0] else "highest"


def choose_rate(suite: Suite, folder: Path, model: str, task: str, variant: str) -> RateChoice:
    """Choose the learning rate of a row by its validation runs: the best mean score, or the lowest loss among equals."""
    source = suite.methods[variant].learning_rates_from
    if source is not None:
        choice = choose_rate(suite, folder, model, task, source)
        return RateChoice(choice.rate, [], f"The rate of {source}: {choice.reason}", choice.decided)
    rates = suite.grid(variant)
    if len(rates) == 1:
        return RateChoice(rates[0], [], "The only rate that the suite has for it.")
    name = suite.score_name(task)
    runs = searches(suite, model, task, variant)
    tried = [_tried(rate, name, [read_run(folder, run) for run in runs if run.learning_rate == rate]) for rate in rates]
    missing = len(runs) - sum(rate.done for rate in tried)
    if missing:
        return RateChoice(None, tried, f"{missing} of {len(runs)} validation runs are not made yet.", False)
    scored = [rate for rate in tried if rate.score is not None]
    if not scored:
        return RateChoice(None, tried, f"No learning rate worked: {tried[0].failure}")
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0
    best = max(scored, key=lambda rate: (sign * (rate.score or 0.0), -(math.inf if rate.loss is None else rate.loss)))
    return RateChoice(best.learning_rate, tried, f"Best {name} on the validation part, {best.score:.4g}.")


def _tried(rate: float, name: str, records: list[RunRecord | None]) -> TriedRate:
    """Summarize a rate's runs. If one failed or its metric is not finite, the rate has no score: any other is better."""
    done = [record for record in records if record is not None]
    failure = next((_failure(record, name) for record in done if _failure(record, name)), None)
    if failure or len(done) < len(records):
        return TriedRate(rate, done=len(done), failure=failure)
    losses = [record.metrics.get("loss") for record in done]
    loss = mean(value for value in losses if value is not None) if None not in losses else None
    return TriedRate(rate, mean(record.metrics[name] for record in done), loss, len(done))


def _failure(record: RunRecord, name: str) -> str | None:
    if record.status != "ok":
        return f"{record.status}: {record.error}"
    # A record has None where a number was not finite.
    value = record.metrics.get(name)
    return f"its {name} is not finite" if value is None or not math.isfinite(value) else None
