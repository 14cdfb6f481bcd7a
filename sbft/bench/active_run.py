"""What the runner knows of a run that is being made, and of the place where it is: this machine, or a cluster."""

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
    """A run that this runner has begun."""

    run: Run
    folder: Path
    """Its own, in that of the suite."""
    lock: int
    """A descriptor from `try_lock`, which keeps other runners from the run."""
    slot: int
    """Which of the runs at a time it is."""
    time_limit_s: float | None
    began: float = field(default_factory=time.monotonic, kw_only=True)
    timed_out: bool = field(default=False, kw_only=True)
    at_once: int = field(default=1, kw_only=True)
    """The most runs, this one among them, that were seen to share its machine."""

    @property
    def elapsed_s(self) -> float:
        """Seconds that its process has taken, or took."""
        return time.monotonic() - self.began

    @property
    @abstractmethod
    def exit_code(self) -> int | None:
        """Of its process, which has ended, minus the signal where one ended it; None if there was no process."""

    @property
    @abstractmethod
    def cores(self) -> int | None:
        """Of its machine."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether its process is gone, and what it has left lies in the run's folder. Sees to the time limit too."""

    @abstractmethod
    def kill(self) -> None:
        """Begin to end the process and all that it has started."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until what was killed has ended."""

    def shares_machine_with(self, runs: int) -> None:
        """So many runs of the suite's folder, this one among them, are being made by runners of this machine."""
        self.at_once = max(self.at_once, runs)

    def release(self) -> None:
        """Let others have the run."""
        os.close(self.lock)


class Place(ABC):
    """Where runs are made."""

    @property
    @abstractmethod
    def jobs(self) -> int:
        """How many runs at once."""

    @abstractmethod
    def missing_package(self, suite: Suite, variant: str) -> str | None:
        """Why a variant cannot be run, if that is known before its runs are begun."""

    @abstractmethod
    def start(
        self, suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, say: Callable[[str], None]
    ) -> Active:
        """Begin a run.

        Args:
            suite: what the run belongs to.
            folder: that of the suite.
            run: what to run.
            lock: a descriptor from `try_lock`.
            slot: the lowest number from 0 on that no other run of this runner has now.
            say: told in a line what should be known before the run has ended.
        """
