"""Makes the runs of a suite, here or on a cluster, each in a separate process. Finished runs are not made again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from sbft import files
from sbft.bench.active_run import Active, Place
from sbft.bench.archive import ARCHIVE_FILE
from sbft.bench.live import SuiteProgress
from sbft.bench.machine import ThisMachine
from sbft.bench.outcome import conclude, tidy, write_unsupported
from sbft.bench.process import held_locks, log_beside, try_lock
from sbft.bench.schedule import Planned, is_selected, plan
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import SUITE_FILE, Run, possible_runs, read_run, run_folder
from sbft.errors import Interrupted, RecipeError, signal_of
from sbft.recipe.schema import Recipe
from sbft.runs.record import RunRecord

_POLL_S = 0.2
_LOOK_AGAIN_S = 2.0  # while other runners make the remaining runs
_KEYS_NAMED = 5


def run_suite(
    suite: Suite,
    folder: Path,
    progress: SuiteProgress,
    *,
    only: Sequence[str] = (),
    place: Place | None = None,
) -> None:
    """Make every run that has not been made yet.

    Args:
        suite: what to run.
        folder: the suite's folder, made ready by `prepare`.
        progress: shows what happens.
        only: patterns of the runs to make; all if empty.
        place: where the runs are made; one after another on this machine's CPU if None.

    Raises:
        Interrupted: if it was stopped by Ctrl-C or SIGTERM.
    """
    runner = _Runner(suite, folder, progress, only, place or ThisMachine())
    try:
        with _sigterm_is_ctrl_c():
            runner.work()
    except KeyboardInterrupt as interrupt:
        runner.stop()
        done = sum(one.record is not None for one in plan(suite, folder))
        raise Interrupted(
            signal_of(interrupt),
            f" with {done} run{'s' * (done != 1)} finished. Runs that were interrupted will start from the beginning. "
            "To continue, type the same command again.",
        ) from None
    finally:
        runner.stop()


def check_same(suite: Suite, folder: Path, *, retry: bool = False) -> None:
    """Check that the finished runs in a folder belong to this suite. Changes nothing.

    Args:
        suite: the suite to run; it may have more methods, rates, seeds or tasks than were run.
        folder: the suite's folder.
        retry: failed runs will be made again, so their settings may differ.

    Raises:
        RecipeError: if a finished run was made with other settings than the suite has now.
    """
    for run in possible_runs(suite):
        record = read_run(folder, run)
        if record is not None and not (retry and record.status != "ok"):
            _check_same(suite, folder, run, record)


def prepare(suite: Suite, folder: Path, *, retry: bool = False, only: Sequence[str] = ()) -> None:
    """Make the folder of a suite ready: write the suite into it, and tidy up after a killed runner.

    Args:
        suite: the suite to run.
        folder: the suite's folder.
        retry: make failed runs again.
        only: patterns of the failed runs to make again; all if empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / SUITE_FILE, suite.to_yaml())
    for run in possible_runs(suite):
        record = read_run(folder, run)
        again = retry and record is not None and record.status != "ok" and is_selected(run.name, only)
        if record is None or not (again or log_beside(run_folder(folder, run)).exists()):
            continue
        lock = try_lock(folder, run)
        if lock is None:
            continue
        if again:
            record.status, record.error = "unfinished", None
            target = run_folder(folder, run)
            target.mkdir(parents=True, exist_ok=True)  # an archived run has no folder
            record.save(target)
        else:
            tidy(suite, run_folder(folder, run))
        os.close(lock)


def _check_same(suite: Suite, folder: Path, run: Run, record: RunRecord) -> None:
    expected = run.whole_recipe(suite)
    try:
        made = Recipe.model_validate(record.recipe)
    except ValidationError as error:
        raise RecipeError(
            f"The record of the run {run.name} in {folder} cannot be read by this version of sbft. {_ways_out(folder, run)}"
        ) from error
    there, here = _flat(made), _flat(expected)
    differing = [
        f"{key} (there {there.get(key)}, now {here.get(key)})"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key != "output_dir"
    ]
    if differing:
        more = f" and {len(differing) - _KEYS_NAMED} more" if len(differing) > _KEYS_NAMED else ""
        raise RecipeError(
            f"The run {run.name} in {folder} was made with other settings than the suite now has: "
            f"{', '.join(differing[:_KEYS_NAMED])}{more}. "
            + ("It failed: add --retry to make it again. " if record.status != "ok" else "")
            + _ways_out(folder, run)
        )


def _ways_out(folder: Path, run: Run) -> str:
    target = run_folder(folder, run)
    remove = f"rm -r '{target}'" if target.is_dir() else f"delete its line from {folder / ARCHIVE_FILE}"
    return (
        "Use another --output-dir to start afresh, or change the suite back, or remove the run to make it again: "
        f"{remove}"
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys and values; a value of None is the same as a missing key."""

    def flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(flat(recipe.model_dump(mode="json", exclude_none=True), ""))


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Make SIGTERM, as from a batch system or `kill`, act like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class _Runner:
    """The main loop: whenever a slot is free, it starts the first run that is neither finished nor in progress."""

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        progress: SuiteProgress,
        only: Sequence[str],
        place: Place,
    ) -> None:
        self.suite, self.folder, self.progress = suite, folder, progress
        self.only, self.place = only, place
        self.active: list[Active] = []
        self.elsewhere: list[str] = []
        """Runs that another runner, or one of its processes, is making."""
        self.planned: list[Planned] = []
        self._looked = 0.0

    def work(self) -> None:
        """Make runs until none is left."""
        self.look()
        while True:
            self.collect()
            while len(self.active) < self.place.jobs and self.start_next():
                pass
            if not self.active and not self.elsewhere:
                return
            if not self.active:
                self.progress.waits(self.elsewhere)
            self.progress.draw(self.planned, self.active)
            time.sleep(_POLL_S)
            if self.elsewhere and time.monotonic() - self._looked > _LOOK_AGAIN_S:
                self.look()

    def look(self) -> None:
        """Reread the state of all runs."""
        self.planned = [run for run in plan(self.suite, self.folder) if is_selected(run.name, self.only)]
        self._looked = time.monotonic()

    def collect(self) -> None:
        """Record the runs that have ended."""
        for active in [active for active in self.active if active.has_ended()]:
            self.count()
            record = conclude(self.suite, active)
            self.active.remove(active)
            active.release()
            self.look()
            self.progress.ended(active.run.name, record, active.elapsed_s, self.planned)

    def start_next(self) -> bool:
        """Start the first run that can be started; returns False if there is none."""
        working = {active.run for active in self.active}
        self.elsewhere = []
        for planned in self.planned:
            run = planned.run
            if run is None or planned.state != "to do" or run in working:
                continue
            lock = try_lock(self.folder, run)
            if lock is None:
                self.elsewhere.append(run.name)
                continue
            if self._needs_no_process(run):
                os.close(lock)
                self.look()
                return self.start_next()
            slot = min(set(range(len(self.active) + 1)) - {active.slot for active in self.active})
            self.active.append(
                self.place.start(self.suite, self.folder, run, lock=lock, slot=slot, say=self.progress.say)
            )
            self.count()
            self.progress.begins(run.name, self.planned)
            return True
        return False

    def count(self) -> None:
        """Tell each active run how many runs share its machine, including those of other runners on this folder."""
        held = held_locks(self.folder)
        for active in self.active:
            active.shares_machine_with(held)

    def _needs_no_process(self, run: Run) -> bool:
        if read_run(self.folder, run) is not None:
            return True  # another runner has made it since the plan was read
        reason = self.place.missing_package(self.suite, run.variant)
        if reason is None:
            return False
        record = write_unsupported(self.suite, self.folder, run, reason)
        self.progress.ended(run.name, record, 0.0, self.planned)
        return True

    def stop(self) -> None:
        """End all active runs. They do not count as results."""
        for active in self.active:
            active.kill()
        for active in self.active:
            active.wait()
            record = read_run(self.folder, active.run)
            # It may have finished just now, or failed by itself.
            if record is not None and record.status == "ok":
                tidy(self.suite, active.folder)
            elif record is not None:
                record.status, record.error = "unfinished", None
                record.save(active.folder)
            active.release()
        self.active = []
