"""The progress of a suite on the terminal: a table that is drawn anew, or plain lines where the output is no terminal."""

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
from sbft.bench.suite_runs import groups
from sbft.native.sizes import gib
from sbft.runs.record import RunRecord

_REDRAW_EVERY_S = 0.5
_LONGEST_REASON = 300


class SuiteProgress:
    """Tells what the runner does."""

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
        """A run has ended, without a record if it was stopped from outside; above the table too, its line stays."""
        self.say(f"{_count(planned)} {name}: {_result(record, elapsed_s)}")

    def waits(self, names: Sequence[str]) -> None:
        """All that is left is being run elsewhere."""
        if self._waits_for != tuple(names):
            self._waits_for = tuple(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.say(f"Waiting for another runner, which works on {names[0]}{more}.")

    def draw(self, planned: Sequence[Planned], active: Sequence[Active]) -> None:
        """Draw the table anew, if it is time."""
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
        known = predictions(planned)
        choices = self._rates(planned)
        for model, task in groups(self._suite):
            for variant in self._suite.ordered_methods():
                mine = [one for one in planned if one.row == (model, task, variant)]
                if not mine:
                    continue
                rate = choices[model, task, variant]
                left = [known.get(one.name) for one in mine if one.state == "to do"]
                table.add_row(
                    *([model] if several else []),
                    task,
                    variant,
                    _done([one for one in mine if one.phase == "validation"]),
                    f"{rate.rate:g}" if rate.rate is not None else "none" if rate.decided else "",
                    _done([one for one in mine if one.phase == "test"]),
                    "" if not left else "?" if None in left else duration(sum(value or 0.0 for value in left)),
                    _now(mine, active),
                )
        return table

    def _rates(self, planned: Sequence[Planned]) -> dict[tuple[str, str, str], RateChoice]:
        """The learning rate of each row; records are read only for a new plan, which there is when a run has ended."""
        if planned is not self._chosen_for:
            rows = dict.fromkeys(one.row for one in planned)
            self._choices = {row: choose_rate(self._suite, self._folder, *row) for row in rows}
            self._chosen_for = planned
        return self._choices


def _count(planned: Sequence[Planned]) -> str:
    return f"[{sum(one.state != 'to do' for one in planned)}/{len(planned)}]"


def _done(planned: Sequence[Planned]) -> str:
    """Done and all, and how many of the former failed."""
    if not planned:
        return ""
    failed = sum(one.state == "failed" for one in planned)
    told = f"{sum(one.record is not None for one in planned)}/{len(planned)}"
    return f"{told}, {failed} failed" if failed else told


def _now(mine: Sequence[Planned], active: Sequence[Active]) -> str:
    names = {one.name for one in mine}
    working = [one for one in active if one.run.name in names]
    return ", ".join(
        f"{f'lr {one.run.learning_rate:g}' if one.run.phase == 'validation' else f'seed {one.run.seed}'} "
        f"{duration(one.elapsed_s)}"
        for one in working
    )


def _result(record: RunRecord | None, elapsed_s: float) -> str:
    """The main figures of a run, or why there are none."""
    if record is None:
        return "was stopped, and will be made again."
    if record.status != "ok":
        reason = " ".join((record.error or "").split())
        return f"{record.status}: {reason[:_LONGEST_REASON]}"
    # The perplexity is only the loss said otherwise.
    figures = [
        f"{name} {value:.4g}" for name, value in record.metrics.items() if value is not None and name != "perplexity"
    ]
    if record.peak_memory_bytes is not None:
        figures.append(f"peak {gib(record.peak_memory_bytes)}")
    return f"done in {duration(elapsed_s)}: {', '.join(figures)}"
