"""Runs as processes of this machine: one that works on a run, and the lock that keeps all others from the same run."""

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
# To end a step, and to write what was measured until then.
_GRACE_S = 20.0


def try_lock(folder: Path, run: Run) -> int | None:
    """A file descriptor that holds the lock of a run in a suite's folder; None if another process has it.

    The lock ends with the last process that has the descriptor open: a run that outlives its runner still holds it.
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
    """How many runs of a suite's folder are being worked on, by whatever runner."""
    return sum(_is_held(path) for path in (folder / LOCKS_FOLDER).glob("*.lock"))


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        # Shared, so that two that count do not count each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def log_beside(folder: Path) -> Path:
    """Where the output of a run goes while it works: `sbft train` wants its own folder empty."""
    return folder.with_name(f"{folder.name}.log")


def recipe_beside(folder: Path) -> Path:
    """The recipe that the process of a run is given."""
    return folder.with_name(f"{folder.name}.yaml")


def clear(folder: Path) -> None:
    """Remove what an interrupted run has left in its folder."""
    if folder.exists():
        shutil.rmtree(folder)


@dataclass
class ActiveProcess(Active):
    """A run that a process of this machine works on."""

    process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """Of the process; minus the signal where one ended it."""
        return self.process.returncode

    @property
    def cores(self) -> int | None:
        """Of this machine."""
        return os.cpu_count()

    def has_ended(self) -> bool:
        """Whether the process is gone; one that is over its time limit is told to stop, and after a while killed."""
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
        """End the process and all that it has started."""
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
        folder: that of the suite.
        run: what to run.
        lock: a descriptor from `try_lock`, which the process gets too.
        slot: which of the runs at a time it is.
        environment: variables beside those of this process.
        working_folder: where the suite's relative paths begin; that of this process if not given.
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
            # Ctrl-C is for the runner alone, which ends its runs itself.
            start_new_session=True,
        )
    return ActiveProcess(run, target, lock, slot, suite.time_limit_s, process)
