"""The OpenMP runtime that torch has loaded, and how long its threads spin while they wait for each other.

A libgomp thread that waits for another spins for some milliseconds before it sleeps. If every thread has a core, that is
fastest. Beside another busy process it is slowest: the spinning thread has the core that the awaited thread needs, and a step
of two threads on two cores takes several times as long (benchmarks/README.md). So `spinning_while_alone` watches whether this
process's threads have to wait for a core that other processes use. While they do, libgomp spins 100 times instead of 300,000.

This uses libgomp's own rule: "if there are more OpenMP threads than available CPUs", the shorter spin is used (its manual,
GOMP_SPINCOUNT). A team of threads that only sleep raises the number of threads, and can be ended again. No setting changes,
and no result: the number of threads that compute, on which the bits of a sum depend, stays the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

SWITCH = "SBFT_ADAPTIVE_SPIN"
LOOK_S = 0.5
"""Time from one look at the cores to the next."""
# The share of their time (running, or ready to run) in which threads waited for a core. On 2 cores it is below 0.01 alone, and
# 0.2 or more beside one busy process. Threads that spin little may share one core, and wait there although another is free.
_WAITED = 0.1
# Cores that other processes use, beyond those that our threads leave free. Above the first number our threads count as crowded,
# until it falls below the second. Measured on 2 cores: while others use a third of a core, steps take equally long on average
# with either spin. While others use one core, steps take half as long with the short spin.
_CROWDED, _FREE = 0.5, 0.35
# With less work than this share of a core, nothing can be concluded.
_LEAST_WORK = 0.1
_RUNTIMES = ("libgomp", "libiomp5", "libomp")
_SET_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_TASKS, _CORES = Path("/proc/self/task"), Path("/proc/stat")
_NANOSECOND = 1e-9


class Look(NamedTuple):
    """What this process's threads and the cores have done so far."""

    threads: dict[str, tuple[int, int]]
    """For each thread of this process: nanoseconds that it ran, and that it was ready to run but had no core."""
    busy_s: float
    """Seconds that the cores of this process were busy, for any process."""
    at_s: float
    """The time of the look."""


def load_sharing_openmp(path: Path) -> ctypes.CDLL:
    """Load compiled code that uses the OpenMP runtime of torch: the threads of a second one would compete for the cores.

    Raises:
        OSError: if it cannot be loaded.
    """
    runtime = openmp_runtime()
    if runtime is not None:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def openmp_runtime() -> Path | None:
    """The file of the OpenMP runtime in this process; None if there is none, or it is unknown."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = (Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines())
    return next((path for path in paths if path.name.startswith(_RUNTIMES)), None)


@contextmanager
def spinning_while_alone(device: torch.device | str = "cpu") -> Iterator[None]:
    """Within, threads that compute on a CPU spin for each other only while the cores are free.

    Nothing is done where nothing can be gained: on another device, with one thread, with a runtime other than libgomp, or off
    Linux. Nor is it if the environment says how to wait (`OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`) or sets `SBFT_ADAPTIVE_SPIN=0`.

    Args:
        device: the device that computes.
    """
    library = _library() if torch.device(device).type == "cpu" else None
    if library is None or not _watching.acquire(blocking=False):
        yield
        return
    watch = SpinWatch(library, torch.get_num_threads())
    watch.start()
    try:
        yield
    finally:
        watch.stop()
        _watching.release()


_watching = threading.Lock()  # an evaluation within training is watched already


def _library() -> ctypes.CDLL | None:
    """libgomp, if its threads' spinning may be changed; else None."""
    if sys.platform != "linux" or torch.get_num_threads() < 2 or os.environ.get(SWITCH) == "0":
        return None
    if any(name in os.environ for name in _SET_BY_THE_USER):
        return None
    path = openmp_runtime()
    if path is None or not path.name.startswith("libgomp") or look() is None:
        return None
    return ctypes.CDLL(str(path))


class SpinWatch(threading.Thread):
    """A thread that looks every `LOOK_S` seconds at who uses the cores, and shortens the spin while others need them.

    Args:
        library: libgomp.
        threads: number of threads that torch computes with.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        super().__init__(name="sbft-spin-watch", daemon=True)
        self._library, self._threads = library, threads
        self._ended = threading.Event()
        self._short: ShortSpin | None = None

    @property
    def crowded(self) -> bool:
        """Whether the spin is short now."""
        return self._short is not None

    def run(self) -> None:
        """Watch until `stop` is called."""
        before = look()
        while before is not None and not self._ended.wait(LOOK_S):
            now = look()
            if now is None:
                break
            self.decide(before, now)
            before = now
        self._spin(short=False)

    def decide(self, before: Look, now: Look) -> None:
        """Set the spin by what happened between two looks."""
        self._spin(short=is_crowded(before, now, threads=self._threads, cores=_cores(), was=self.crowded))

    def stop(self) -> None:
        """End the watch, and restore the spin."""
        self._ended.set()
        self.join()

    def _spin(self, *, short: bool) -> None:
        if short and self._short is None:
            self._short = ShortSpin(self._library, self._threads)
            self._short.__enter__()
        elif not short and self._short is not None:
            self._short.__exit__(None, None, None)
            self._short = None


class ShortSpin:
    """A context manager: within, libgomp manages more threads than there are cores, so all of them use the short spin.

    Args:
        library: libgomp.
        threads: number of threads that it manages already.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._team = max(_cores() - threads, 0) + 2  # libgomp does not count the first of them
        self._made, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold_team, name="sbft-short-spin", daemon=True)

    def __enter__(self) -> ShortSpin:
        self._thread.start()
        self._made.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _hold_team(self) -> None:
        # A team belongs to the thread that made it, and ends with it. Each of its threads calls free(NULL), and sleeps.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._library.GOMP_parallel(nothing, None, ctypes.c_uint(self._team), ctypes.c_uint(0))
        self._made.set()
        self._ended.wait()


def is_crowded(before: Look, now: Look, *, threads: int, cores: int, was: bool) -> bool:
    """Whether other work takes the cores from this process's threads.

    Args:
        before, now: looks at the start and at the end of an interval.
        threads: number of threads that this process computes with.
        cores: number of cores that it may use.
        was: the previous answer, which stays if nothing can be concluded.
    """
    seconds = now.at_s - before.at_s
    if seconds <= 0:
        return was
    ran_ns = waited_ns = 0
    for name, (ran, waited) in now.threads.items():
        ran_before, waited_before = before.threads.get(name, (0, 0))
        ran_ns, waited_ns = ran_ns + ran - ran_before, waited_ns + waited - waited_before
    if (ran_ns + waited_ns) * _NANOSECOND < _LEAST_WORK * seconds:
        return was
    used_by_others = (now.busy_s - before.busy_s - ran_ns * _NANOSECOND) / seconds
    excess = used_by_others - max(cores - threads, 0)
    if was:
        return excess > _FREE
    return excess > _CROWDED and waited_ns > _WAITED * (ran_ns + waited_ns)


def look() -> Look | None:
    """Take a look; None if the kernel does not give the numbers."""
    busy_s = _busy_s()
    threads = {}
    try:
        for thread in _TASKS.iterdir():
            try:
                ran, waited, _ = (thread / "schedstat").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            threads[thread.name] = (int(ran), int(waited))
    except (OSError, ValueError):
        return None
    return None if busy_s is None or not threads else Look(threads, busy_s, time.perf_counter())


def _busy_s() -> float | None:
    """Busy seconds of the cores that this process may use; None if unknown."""
    try:
        lines = [line.split() for line in _CORES.read_text().splitlines()]
    except OSError:
        return None
    own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    # Fields of proc_stat(5): user, nice, system, then idle and waiting for disks, then interrupts.
    ticks = [sum(map(int, [*line[1:4], *line[6:8]])) for line in lines if line[0] in own]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _cores() -> int:
    return len(os.sched_getaffinity(0))
