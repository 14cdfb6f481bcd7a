"""The plan of a suite: its runs in order, the state of each, and how long they will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Literal

from sbft.bench.rate_choice import choose_rate
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Phase, Run, groups, prefix, read_run, repeats, run_name, searches, seconds
from sbft.runs.record import RunRecord

State = Literal["done", "failed", "to do", "no rate"]
UNDECIDED = "?"


@dataclass(frozen=True)
class Planned:
    """A run of the suite, made or not."""

    name: str
    """As `Run.name`, but with `lr=?` while the learning rate of a test run is not decided."""
    model: str
    task: str
    variant: str
    phase: Phase
    run: Run | None
    """None while its learning rate is not decided."""
    record: RunRecord | None
    """None while it is not finished."""
    took_s: float | None = None
    """Seconds that the run took."""
    hopeless: str | None = None
    """Why it has no learning rate."""

    @property
    def state(self) -> State:
        """The state of the run."""
        if self.hopeless is not None:
            return "no rate"
        if self.record is None:
            return "to do"
        return "done" if self.record.status == "ok" else "failed"

    @property
    def row(self) -> tuple[str, str, str]:
        """The row of the comparison: model, task and variant."""
        return self.model, self.task, self.variant


def plan(suite: Suite, folder: Path) -> list[Planned]:
    """All runs in the order in which they are made: task by task, validation runs first."""
    planned: list[Planned] = []
    for model, task in groups(suite):
        for variant in suite.ordered_methods():
            planned += [_planned(folder, run) for run in searches(suite, model, task, variant)]
        for variant in suite.ordered_methods():
            planned += _tests(suite, folder, model, task, variant)
    return planned


def _planned(folder: Path, run: Run) -> Planned:
    record = read_run(folder, run)
    took = None if record is None else seconds(folder, run, record)
    return Planned(run.name, run.model, run.task, run.variant, run.phase, run, record, took)


def _tests(suite: Suite, folder: Path, model: str, task: str, variant: str) -> list[Planned]:
    choice = choose_rate(suite, folder, model, task, variant)
    if choice.rate is not None:
        return [_planned(folder, run) for run in repeats(suite, model, task, variant, choice.rate)]
    before = prefix(suite, model)
    hopeless = choice.reason if choice.decided else None
    return [
        Planned(
            *(run_name(before, task, variant, UNDECIDED, "test", seed), model, task, variant, "test"),
            run=None,
            record=None,
            hopeless=hopeless,
        )
        for seed in suite.seeds
    ]


def is_selected(name: str, patterns: Sequence[str]) -> bool:
    """Whether a run is selected: a pattern matches its whole name or a part between slashes, or there is no pattern."""
    return not patterns or any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, *name.split("/")))


def predictions(planned: Sequence[Planned]) -> dict[str, float]:
    """Predict the seconds of each run that is not made yet, from finished runs of its row, or else of its variant."""
    row_seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in planned:
        if run.state == "done" and run.took_s is not None:
            row_seconds[run.row].append(run.took_s)
            row_seconds[(run.variant,)].append(run.took_s)
    return {
        run.name: mean(those)
        for run in planned
        if run.state == "to do" and (those := row_seconds.get(run.row) or row_seconds.get((run.variant,)))
    }


def duration(length_s: float) -> str:
    """Seconds for people: 42 s, 3 min, 1 h 05 min."""
    if length_s < 90:
        return f"{length_s:.0f} s"
    minutes = round(length_s / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_left(planned: Sequence[Planned], jobs: int) -> str:
    """A sentence on how long the remaining runs will take."""
    todo = [run.name for run in planned if run.state == "to do"]
    if not todo:
        return "Nothing is left to run."
    predicted_s = predictions(planned)
    runs = f"{len(todo)} run{'s' * (len(todo) > 1)} to do"
    unknown = sum(name not in predicted_s for name in todo)
    if unknown == len(todo):
        return f"{runs}; the time is known once the first is done."
    at_once = f", {jobs} at a time" if jobs > 1 else ""
    about = duration(sum(predicted_s[name] for name in todo if name in predicted_s) / jobs)
    rest = f", without {unknown} of methods that have no finished run" if unknown else ""
    return f"{runs}{at_once}: about {about}{rest}."


def listing(planned: Sequence[Planned], jobs: int) -> str:
    """A line for every run with its state and time, and their sum."""
    predicted_s = predictions(planned)
    lines = []
    for run in planned:
        took = predicted_s.get(run.name) if run.took_s is None else run.took_s
        about = "" if took is None else duration(took)
        sign = "~" if run.name in predicted_s else ""
        lines.append(f"{run.state:8}{sign + about:>12}  {run.name}")
    reasons = dict.fromkeys(f"{'/'.join(run.row[1:])}: {run.hopeless}" for run in planned if run.hopeless is not None)
    return "\n".join([*lines, "", *reasons, time_left(planned, jobs)])
