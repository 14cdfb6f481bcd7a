"""What a suite still has to do: its runs in their order, the state of each, and the time they will take."""

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
    """As `Run.name`, with `lr=?` while the learning rate of a test run is not decided."""
    model: str
    task: str
    variant: str
    phase: Phase
    run: Run | None
    """None while its learning rate is not decided."""
    record: RunRecord | None
    """None while it is not finished."""
    took_s: float | None = None
    """Seconds that it took."""
    hopeless: str | None = None
    """Why there is no learning rate to run it at."""

    @property
    def state(self) -> State:
        """How far it is."""
        if self.hopeless is not None:
            return "no rate"
        if self.record is None:
            return "to do"
        return "done" if self.record.status == "ok" else "failed"

    @property
    def row(self) -> tuple[str, str, str]:
        """The row of the comparison that it belongs to."""
        return self.model, self.task, self.variant


def plan(suite: Suite, folder: Path) -> list[Planned]:
    """All runs in the order in which they are made: task by task, the choice of the learning rates first."""
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


def is_wanted(name: str, patterns: Sequence[str]) -> bool:
    """Whether a run is among those asked for: a pattern fits its whole name, or one part between slashes."""
    return not patterns or any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, *name.split("/")))


def predictions(planned: Sequence[Planned]) -> dict[str, float]:
    """Seconds that each run not yet made will take: as those of its row did, or else its method elsewhere."""
    of_row: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in planned:
        if one.state == "done" and one.took_s is not None:
            of_row[one.row].append(one.took_s)
            of_row[(one.variant,)].append(one.took_s)
    return {
        one.name: mean(those)
        for one in planned
        if one.state == "to do" and (those := of_row.get(one.row) or of_row.get((one.variant,)))
    }


def duration(length_s: float) -> str:
    """Seconds for people: 42 s, 3 min, 1 h 05 min."""
    if length_s < 90:
        return f"{length_s:.0f} s"
    minutes = round(length_s / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_left(planned: Sequence[Planned], jobs: int) -> str:
    """A sentence on how long the runs that are not made will take."""
    todo = [one.name for one in planned if one.state == "to do"]
    if not todo:
        return "Nothing is left to run."
    known = predictions(planned)
    runs = f"{len(todo)} run{'s' * (len(todo) > 1)} to do"
    unknown = sum(name not in known for name in todo)
    if unknown == len(todo):
        return f"{runs}; how long they take is known once the first is done."
    at_once = f", {jobs} at once" if jobs > 1 else ""
    about = duration(sum(known[name] for name in todo if name in known) / jobs)
    rest = f" for all but {unknown} of a method that none has been timed of" if unknown else ""
    return f"{runs}{at_once}: about {about}{rest}."


def listing(planned: Sequence[Planned], jobs: int) -> str:
    """Every run with its state and time, a line each, and their sum."""
    known = predictions(planned)
    lines = []
    for one in planned:
        took = known.get(one.name) if one.took_s is None else one.took_s
        about = "" if took is None else duration(took)
        sign = "~" if one.name in known else ""
        lines.append(f"{one.state:8}{sign + about:>12}  {one.name}")
    reasons = dict.fromkeys(f"{'/'.join(one.row[1:])}: {one.hopeless}" for one in planned if one.hopeless is not None)
    return "\n".join([*lines, "", *reasons, time_left(planned, jobs)])
