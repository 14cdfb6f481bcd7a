"""What a machine of a Ray cluster does with a run: a process as anywhere, whose files go back to the runner.

Nothing that the machine keeps is a result, and nothing here imports Ray: a run is cut off when the worker that began it
dies, and is then made again, here or elsewhere, from its beginning.
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
    """The files that a suite names by paths relative to the folder that the runner was started in."""

    folder: Path
    """That folder."""
    files: tuple[tuple[str, int, int], ...] = ()
    """Name, bytes and time of the last change (ns) of each."""
    parcels: tuple[Parcel, ...] = ()
    """Their content; empty where every machine has them."""

    @property
    def are_here(self) -> bool:
        """Whether this machine has these very files in that folder: it is the runner's, or shares its file system."""
        return all(seen(self.folder / name) == (size, changed) for name, size, changed in self.files)


@dataclass(frozen=True)
class Order:
    """A run to be made."""

    suite: Suite
    run: Run
    suite_id: str
    """The same for all runs of a suite's folder, and for no other folder."""
    output_dir: str
    """What the runner calls the folder of the run."""
    cpus: int
    inputs: Inputs
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Variables of the runner's environment that its runs get; tokens may be among them."""


@dataclass(frozen=True)
class Delivery:
    """What came of an order."""

    unsupported: str | None = None
    """Why the machine cannot make the run; then there is nothing else."""
    exit_code: int | None = None
    elapsed_s: float = 0.0
    timed_out: bool = False
    at_once: int = 1
    cores: int | None = None
    files: tuple[Parcel, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Worker:
    """What a machine of the cluster says of itself."""

    host: str
    version: str
    """Of its sbft."""


def introduce() -> Worker:
    """What this machine is."""
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
        put: takes pieces of large files into the cluster's object store.
        get: reads them from there.

    Raises:
        ClusterError: if this machine's folder for such runs belongs to somebody else.
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
            # Ray's own guess would be the worker's, one thread where it was given no number.
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
        if log_beside(target).exists():  # there was no record to tidy
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
    """Where this user's runs are made on this machine: a folder that nobody else may read.

    Raises:
        ClusterError: if it belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir()) / f"sbft-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
        raise ClusterError(
            f"The folder {folder} on {socket.gethostname()} belongs to another user, so that no run can be made there. "
            "Remove it, or set TMPDIR for Ray's processes on that machine."
        )
    return folder


def _lock(folder: Path, run: Run) -> int:
    """The lock of the run on this machine; a process that a dying worker has left may still have it for a moment."""
    while (lock := try_lock(folder, run)) is None:
        time.sleep(_POLL_S)
    return lock


def _working_folder(inputs: Inputs, folder: Path, get: Get) -> Path | None:
    """Where the suite's relative paths begin; None: anywhere, as there are none."""
    if not inputs.files:
        return None
    if inputs.are_here or not inputs.parcels:
        return inputs.folder
    known = hashlib.sha256(repr(inputs.files).encode()).hexdigest()[:16]
    made = folder / "inputs" / known
    if not made.exists():
        part = Path(tempfile.mkdtemp(prefix=f"{known}.", dir=_made(made.parent)))
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
    """Have the record, recipe and card of a run say that they lie where the runner will put them."""
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
