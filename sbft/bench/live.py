"""The progress of a suite: a table that is redrawn on a terminal, or plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sbft.bench.active_run import Active
from sbft.bench.rate_choice import RateChoice, choose_rate
from sbft.bench.schedule import Planned, duration, predictions, time_left
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, groups
from sbft.native.sizes import gib
from sbft.runs.record import RunRecord

_REDRAW_EVERY_S = 0.5
_LONGEST_REASON = 300


class SuiteProgress:
    """Shows what the runner does."""

    def __init__(self, console: Console, suite: Suite, folder: Path, jobs: int) -> None:
        self._console, self._suite, self._folder, self._jobs = console, suite, folder, jobs
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._drawn = 0.0
        self._waits_for: tuple[str, ...] = ()
        self._chosen_for: Sequence[Planned] | None = None
        self._choices: dict[tuple[str, str, str], RateChoice] = {}

    def __enter__(self) -> SuiteProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, name: str, planned: Sequence[Planned]) -> None:
        """A run was started."""
        if self._live is None:
            self.say(f"{_count(planned)} {name} begins. {time_left(planned, self._jobs)}")

    def ended(self, name: str, record: RunRecord | None, elapsed_s: float, planned: Sequence[Planned]) -> None:
        """A run has ended, without a record if it was stopped from outside. Its line stays, above any table."""
        self.say(f"{_count(planned)} {name}: {_result(record, elapsed_s)}")

    def waits(self, names: Sequence[str]) -> None:
        """Other runners are making all remaining runs."""
        if self._waits_for != tuple(names):
            self._waits_for = tuple(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.say(f"Waiting for another runner, which is making {names[0]}{more}.")

    def draw(self, planned: Sequence[Planned], active: Sequence[Active]) -> None:
        """Redraw the table, if it is time."""
        now = time.monotonic()
        if self._live is None or now - self._drawn < _REDRAW_EVERY_S:
            return
        self._drawn = now
        self._live.update(self._picture(planned, active), refresh=True)

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(line, markup=False, soft_wrap=True)

    def _picture(self, planned: Sequence[Planned], active: Sequence[Active]) -> Group:
        return Group(self._table(planned, active), Text(f"{_count(planned)} {time_left(planned, self._jobs)}"))

    def _table(self, planned: Sequence[Planned], active: Sequence[Active]) -> Table:
        several = len(self._suite.models) > 1
        table = Table(box=None, pad_edge=False)
        for heading in (*(["model"] if several else []), "task", "method"):
            table.add_column(heading, no_wrap=True)
        for heading in ("validation", "rate", "test", "left"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("now")
        predicted_s = predictions(planned)
        choices = self._rates(planned)
        for model, task in groups(self._suite):
            for variant in self._suite.ordered_methods():
                mine = [run for run in planned if run.row == (model, task, variant)]
                if not mine:
                    continue
                rate = choices[model, task, variant]
                left = [predicted_s.get(run.name) for run in mine if run.state == "to do"]
                table.add_row(
                    *([model] if several else []),
                    task,
                    variant,
                    _done([run for run in mine if run.phase == "validation"]),
                    f"{rate.rate:g}" if rate.rate is not None else "none" if rate.decided else "",
                    _done([run for run in mine if run.phase == "test"]),
                    "" if not left else "?" if None in left else duration(sum(value or 0.0 for value in left)),
                    _now(mine, active),
                )
        return table

    def _rates(self, planned: Sequence[Planned]) -> dict[tuple[str, str, str], RateChoice]:
        """The learning rate of each row. Records are only read for a new plan, which follows the end of a run."""
        if planned is not self._chosen_for:
            rows = dict.fromkeys(run.row for run in planned)
            self._choices = {row: choose_rate(self._suite, self._folder, *row) for row in rows}
            self._chosen_for = planned
        return self._choices


def _count(planned: Sequence[Planned]) -> str:
    return f"[{sum(run.state != 'to do' for run in planned)}/{len(planned)}]"


def _done(planned: Sequence[Planned]) -> str:
    """Numbers of finished and of all runs, and how many of the finished ones failed."""
    if not planned:
        return ""
    failed = sum(run.state == "failed" for run in planned)
    counts = f"{sum(run.record is not None for run in planned)}/{len(planned)}"
    return f"{counts}, {failed} failed" if failed else counts


def _now(mine: Sequence[Planned], active: Sequence[Active]) -> str:
    names = {run.name for run in mine}
    in_progress = [active_run for active_run in active if active_run.run.name in names]
    return ", ".join(f"{_seed_or_rate(active_run.run)} {duration(active_run.elapsed_s)}" for active_run in in_progress)


def _seed_or_rate(run: Run) -> str:
    return f"lr {run.learning_rate:g}" if run.phase == "validation" else f"seed {run.seed}"


def _result(record: RunRecord | None, elapsed_s: float) -> str:
    """The main metrics of a run, or why there are none."""
    if record is None:
        return "was stopped, and will be made again."
    if record.status != "ok":
        reason = " ".join((record.error or "").split())
        return f"{record.status}: {reason[:_LONGEST_REASON]}"
    # The perplexity says the same as the loss.
    figures = [
        f"{name} {value:.4g}" for name, value in record.metrics.items() if value is not None and name != "perplexity"
    ]
    if record.peak_memory_bytes is not None:
        figures.append(f"peak {gib(record.peak_memory_bytes)}")
    return f"done in {duration(elapsed_s)}: {', '.join(figures)}"
