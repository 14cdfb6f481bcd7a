"""Makes a run on a machine of a Ray cluster: in a process like any other, whose files are sent back to the runner.

Nothing that stays on the machine is a result. A run ends when the worker that started it dies, and is then made again from
the beginning, here or elsewhere. This module does not import Ray.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import sbft
from sbft.bench.outcome import missing_package, tidy
from sbft.bench.process import clear, held_locks, log_beside, start, try_lock
from sbft.bench.ray.transfer import Get, Parcel, Put, files_below, pack, unpack
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import LOG_FILE, RECIPE_FILE, Run, run_folder, stored_record
from sbft.errors import ClusterError

_POLL_S = 0.2


@dataclass(frozen=True)
class Inputs:
    """The files that a suite names by paths relative to the runner's working folder."""

    folder: Path
    """The runner's working folder."""
    files: tuple[tuple[str, int, int], ...] = ()
    """Name, bytes and time of the last change (ns) of each."""
    parcels: tuple[Parcel, ...] = ()
    """Their contents; empty where every machine has the files."""

    @property
    def are_here(self) -> bool:
        """Whether this machine already has these files: it is the runner's, or shares its file system."""
        return all(seen(self.folder / name) == (size, changed) for name, size, changed in self.files)


@dataclass(frozen=True)
class Order:
    """A run to be made."""

    suite: Suite
    run: Run
    suite_id: str
    """Identifies the suite's folder."""
    output_dir: str
    """The run's folder on the runner's machine."""
    cpus: int
    inputs: Inputs
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Environment variables from the runner; they may include access tokens."""


@dataclass(frozen=True)
class Delivery:
    """The result of an order."""

    unsupported: str | None = None
    """Why the machine cannot make the run; then all else is empty."""
    exit_code: int | None = None
    elapsed_s: float = 0.0
    timed_out: bool = False
    at_once: int = 1
    cores: int | None = None
    files: tuple[Parcel, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Worker:
    """What a machine of the cluster reports about itself."""

    host: str
    version: str
    """The version of its sbft."""


def introduce() -> Worker:
    """Describe this machine."""
    return Worker(socket.gethostname(), sbft.__version__)


def seen(path: Path) -> tuple[int, int] | None:
    """Bytes and time of the last change (ns) of a file; None if there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def make(order: Order, put: Put, get: Get) -> Delivery:
    """Make a run on this machine, in a folder that is removed afterwards.

    Args:
        order: what to run.
        put: puts pieces of large files into the cluster's object store.
        get: reads them from there.

    Raises:
        ClusterError: if this machine's folder for such runs belongs to another user.
    """
    suite, run = order.suite, order.run
    reason = missing_package(suite, run.variant)
    if reason is not None:
        return Delivery(unsupported=reason)
    folder = work_folder() / order.suite_id
    target = run_folder(folder, run)
    lock = _lock(folder, run)
    try:
        active = start(
            suite,
            folder,
            run,
            lock=lock,
            slot=0,
            # Otherwise the process would inherit the worker's setting, which Ray makes 1 by default.
            environment={"OMP_NUM_THREADS": str(order.cpus), **order.environment},
            working_folder=_working_folder(order.inputs, folder, get),
        )
        try:
            while not active.has_ended():
                active.shares_machine_with(held_locks(folder))
                time.sleep(_POLL_S)
            elapsed_s = active.elapsed_s
        except BaseException:  # Ray cancels a task by a KeyboardInterrupt
            active.kill()
            active.wait()
            raise
        tidy(suite, target)
        _as_the_runner_names_it(target, order.output_dir)
        if log_beside(target).exists():  # there is no record, so `conclude` has not moved the log
            target.mkdir(parents=True, exist_ok=True)
            os.replace(log_beside(target), target / LOG_FILE)
        return Delivery(
            exit_code=active.exit_code,
            elapsed_s=elapsed_s,
            timed_out=active.timed_out,
            at_once=active.at_once,
            cores=active.cores,
            files=tuple(pack(target, files_below(target), put)),
        )
    finally:
        clear(target)
        os.close(lock)


def work_folder() -> Path:
    """The folder for this user's runs on this machine, which no other user can read.

    Raises:
        ClusterError: if it belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"sbft-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
        raise ClusterError(
            f"The folder {folder} on {socket.gethostname()} belongs to another user, so no run can be made there. "
            "Remove it, or set TMPDIR for Ray's processes on that machine."
        )
    return folder


def _lock(folder: Path, run: Run) -> int:
    """Take the run's lock on this machine. The process of a dying worker may still hold it for a moment."""
    while (lock := try_lock(folder, run)) is None:
        time.sleep(_POLL_S)
    return lock


def _working_folder(inputs: Inputs, folder: Path, get: Get) -> Path | None:
    """The folder that the suite's relative paths are relative to; None if there are no such paths."""
    if not inputs.files:
        return None
    if inputs.are_here or not inputs.parcels:
        return inputs.folder
    digest = hashlib.sha256(repr(inputs.files).encode()).hexdigest()[:16]
    made = folder / "inputs" / digest
    if not made.exists():
        part = Path(tempfile.mkdtemp(prefix=f"{digest}.", dir=_made(made.parent)))
        unpack(inputs.parcels, part, get)
        try:
            part.rename(made)
        except OSError:  # another run of this suite was first
            shutil.rmtree(part)
    return made


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_the_runner_names_it(folder: Path, name: str) -> None:
    """Change paths in a run's record, recipe and card to where the runner will put its files."""
    record = stored_record(folder)
    if record is not None and "output_dir" in record.recipe:
        record.recipe["output_dir"] = name
        record.save(folder)
    recipe, card = folder / RECIPE_FILE, folder / "README.md"
    if recipe.exists():
        content = {**yaml.safe_load(recipe.read_text(encoding="utf-8")), "output_dir": name}
        recipe.write_text(yaml.safe_dump(content, sort_keys=False, width=100), encoding="utf-8")
    if card.exists():
        card.write_text(card.read_text(encoding="utf-8").replace(str(folder), name), encoding="utf-8")
