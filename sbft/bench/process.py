"""Runs as processes on this machine, and the lock that keeps others from making the same run."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from sbft.bench.active_run import Active
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, run_folder

LOCKS_FOLDER = "locks"
# Time for a process to finish its step and to write its measurements.
_GRACE_S = 20.0


def try_lock(folder: Path, run: Run) -> int | None:
    """Take the lock of a run in a suite's folder: returns a file descriptor, or None if another process has the lock.

    The lock is held as long as any process has the descriptor open. So a run that outlives its runner still holds it.
    """
    path = folder / LOCKS_FOLDER / f"{run.name.replace('/', '__')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def held_locks(folder: Path) -> int:
    """How many runs of a suite's folder are in progress, whichever runner makes them."""
    return sum(_is_held(path) for path in (folder / LOCKS_FOLDER).glob("*.lock"))


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        # A shared lock, so that two processes that count at the same time do not count each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def log_beside(folder: Path) -> Path:
    """Where the output of a run goes while it is in progress: `sbft train` requires an empty folder."""
    return folder.with_name(f"{folder.name}.log")


def recipe_beside(folder: Path) -> Path:
    """Path of the recipe that a run's process reads."""
    return folder.with_name(f"{folder.name}.yaml")


def clear(folder: Path) -> None:
    """Remove what an interrupted run left in its folder."""
    if folder.exists():
        shutil.rmtree(folder)


@dataclass
class ActiveProcess(Active):
    """A run made by a process on this machine."""

    process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process: negative if a signal ended it."""
        return self.process.returncode

    @property
    def cores(self) -> int | None:
        """Number of cores of this machine."""
        return os.cpu_count()

    def has_ended(self) -> bool:
        """Whether the process has ended. Beyond its time limit it is asked to stop, and later killed."""
        if self.process.poll() is not None:
            return True
        if self.time_limit_s is not None and self.elapsed_s > self.time_limit_s:
            if not self.timed_out:
                self.timed_out = True
                self._signal(signal.SIGTERM)
            elif self.elapsed_s > self.time_limit_s + _GRACE_S:
                self._signal(signal.SIGKILL)
        return False

    def kill(self) -> None:
        """Kill the process and everything that it has started."""
        self._signal(signal.SIGKILL)

    def wait(self) -> None:
        """Wait for the process."""
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # it has ended in the meantime


def start(
    suite: Suite,
    folder: Path,
    run: Run,
    *,
    lock: int,
    slot: int,
    environment: dict[str, str],
    working_folder: Path | None = None,
) -> ActiveProcess:
    """Start the process of a run, in an empty folder.

    Args:
        suite: what the run belongs to.
        folder: the suite's.
        run: what to run.
        lock: a descriptor from `try_lock`, which the process inherits.
        slot: see `Place.start`.
        environment: variables to add to those of this process.
        working_folder: what the suite's relative paths are relative to; this process's working folder if None.
    """
    target = run_folder(folder, run)
    clear(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    recipe = recipe_beside(target)
    recipe.write_text(yaml.safe_dump(run.recipe(suite), sort_keys=False), encoding="utf-8")
    train = ["train", str(recipe), "--output-dir", str(target), "--overwrite"]
    with log_beside(target).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sbft.bench.child", str(os.getpid()), *train],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=working_folder,
            pass_fds=(lock,),
            # Ctrl-C goes to the runner alone, which ends its runs itself.
            start_new_session=True,
        )
    return ActiveProcess(run, target, lock, slot, suite.time_limit_s, process)
