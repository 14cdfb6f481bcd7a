"""What the runner knows about a run in progress, and about the place where it runs: this machine or a cluster."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run


@dataclass
class Active(ABC):
    """A run that this runner has started."""

    run: Run
    folder: Path
    """The run's folder, inside the suite's."""
    lock: int
    """A descriptor from `try_lock`, which keeps other runners away from this run."""
    slot: int
    """The number, from 0, of its slot among the runs that may run at the same time."""
    time_limit_s: float | None
    began: float = field(default_factory=time.monotonic, kw_only=True)
    timed_out: bool = field(default=False, kw_only=True)
    at_once: int = field(default=1, kw_only=True)
    """The highest number of runs, including this one, that were seen on its machine at the same time."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since its process started, until its end if it has ended."""
        return time.monotonic() - self.began

    @property
    @abstractmethod
    def exit_code(self) -> int | None:
        """The exit code of its process: negative if a signal ended it; None if there was no process."""

    @property
    @abstractmethod
    def cores(self) -> int | None:
        """Number of cores of its machine, where known."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether its process has ended and its files are in the run's folder. Also enforces the time limit."""

    @abstractmethod
    def kill(self) -> None:
        """Start ending the process and everything that it has started."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the killed process has ended."""

    def shares_machine_with(self, runs: int) -> None:
        """Take note that runners of this machine are making `runs` runs of the suite's folder, including this one."""
        self.at_once = max(self.at_once, runs)

    def release(self) -> None:
        """Release the lock of the run."""
        os.close(self.lock)


class Place(ABC):
    """A place that runs are made at."""

    @property
    @abstractmethod
    def jobs(self) -> int:
        """How many runs may run at the same time."""

    @abstractmethod
    def missing_package(self, suite: Suite, variant: str) -> str | None:
        """Why a variant cannot be run, if this is known before its runs start."""

    @abstractmethod
    def start(
        self, suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, say: Callable[[str], None]
    ) -> Active:
        """Start a run.

        Args:
            suite: what the run belongs to.
            folder: the suite's.
            run: what to run.
            lock: a descriptor from `try_lock`.
            slot: the lowest number, from 0, that no other active run of this runner has.
            say: called with a line about anything that a user should know before the run has ended.
        """
