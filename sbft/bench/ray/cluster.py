"""Runs on the machines of a Ray cluster. Each is a task that starts a process, as a run on this machine would.

Only the runner decides what to run and writes into the suite's folder; the cluster's machines need no access to it. A run
whose worker or machine died is given to the cluster again, a few times.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import sbft
from sbft.bench.active_run import Active, Place
from sbft.bench.outcome import write_failure, write_unsupported
from sbft.bench.process import clear
from sbft.bench.ray import worker as ray_worker
from sbft.bench.ray.connection import LOCAL, connect, last_line
from sbft.bench.ray.needs import local_files, needs, passed_on, room
from sbft.bench.ray.transfer import pack, unpack_run
from sbft.bench.ray.worker import Delivery, Inputs, Order, Worker, seen
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, run_folder
from sbft.errors import ClusterError

_RETRIES = 3
_INTRODUCTION_S = 300.0  # a machine may have to start a worker process first, and load Python from a slow disk
_CANCEL_S = 20.0
_LOOK_AGAIN_S = 5.0


class Lost(Exception):
    """The worker that received an order died or could not carry it out.

    Args:
        reason: a sentence.
        out_of_memory: its machine's memory had run out.
    """

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


class Cluster(Place):
    """A Ray cluster; connected within `with Cluster(...)`.

    Args:
        address: HOST:PORT, `auto`, `ray://HOST:PORT`, or `local`.
        suite: what will be run.
        folder: the suite's.
        jobs: how many runs at the same time; as many as there is room for if None.

    Raises:
        MissingPackageError: if Ray is not installed.
        ClusterError: if there is no cluster at the address, or its machines have another sbft, or none.
        RecipeError: if the suite names files that cannot be sent to its machines.
    """

    def __init__(self, address: str, suite: Suite, folder: Path, jobs: int | None = None) -> None:
        here = Path.cwd()
        names = local_files(suite, here)
        self._ray = connect(address)
        try:
            self._asked = jobs
            resources = self._machines()
            # An empty CUDA_VISIBLE_DEVICES forbids the use of GPUs, as it does for runs on this machine.
            self.needs = needs(resources, jobs, use_gpus=os.environ.get("CUDA_VISIBLE_DEVICES") != "")
            self._room, self._looked = room(resources, self.needs), time.monotonic()
            self._check_workers()
            files = tuple((name, *(seen(here / name) or (0, 0))) for name in names)
            parcels = () if address == LOCAL else tuple(pack(here, names, self._ray.put))
            self._inputs = Inputs(here, files, parcels)
        except BaseException:
            self._ray.shutdown()
            raise
        self._suite_id = hashlib.sha256(f"{socket.gethostname()}:{folder.resolve()}".encode()).hexdigest()[:16]
        # Ray itself must not retry: retries are counted here, to be reported and recorded.
        self._task = self._ray.remote(num_cpus=self.needs.cpus, num_gpus=self.needs.gpus, max_retries=0)(_make)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    @property
    def jobs(self) -> int:
        """As many runs as there is room for, at most `jobs`; at least one, which then waits for room."""
        return max(min(self.room, self._asked or self.room), 1)

    @property
    def room(self) -> int:
        """How many runs fit on the machines that are alive."""
        if time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._room, self._looked = room(self._machines(), self.needs), time.monotonic()
        return self._room

    def missing_package(self, suite: Suite, variant: str) -> str | None:
        """None: a package may be missing on the machine that receives the run, which then reports it."""
        return None

    def start(
        self, suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, say: Callable[[str], None]
    ) -> RemoteRun:
        """Submit a run to the cluster; see `Place`."""
        target = run_folder(folder, run)
        clear(target)
        order = Order(suite, run, self._suite_id, str(target), self.needs.cpus, self._inputs, passed_on(os.environ))
        return RemoteRun(run, target, lock, slot, suite.time_limit_s, self, order, folder, say)

    def submit(self, order: Order) -> Any:
        """Submit an order, for any machine to carry out; returns Ray's reference to the delivery."""
        return self._task.remote(order)

    def has_ended(self, reference: Any) -> bool:
        """Whether a delivery has arrived or is known to be lost."""
        ready, _ = self._ray.wait([reference], timeout=0)
        return bool(ready)

    def receive(self, reference: Any, folder: Path) -> Delivery:
        """Receive a delivery and write its files into the run's folder.

        Raises:
            Lost: if the delivery or one of its files is lost.
        """
        errors = self._ray.exceptions
        try:
            delivery: Delivery = self._ray.get(reference)
            unpack_run(delivery.files, folder, self._ray.get)
            return delivery
        except errors.OutOfMemoryError as error:
            raise Lost("its machine's memory ran out", out_of_memory=True) from error
        except errors.NodeDiedError as error:
            raise Lost("its machine died") from error
        except errors.WorkerCrashedError as error:
            raise Lost("its worker process died") from error
        except errors.RayError as error:
            raise Lost(last_line(error)) from error

    def cancel(self, reference: Any, *, force: bool = False) -> None:
        """Make the worker end its run. With `force`, end the worker itself, which on Linux ends its processes too."""
        self._ray.cancel(reference, force=force)

    def wait(self, reference: Any) -> bool:
        """Wait some seconds for a cancelled task to end; returns whether it has."""
        ready, _ = self._ray.wait([reference], timeout=_CANCEL_S)
        return bool(ready)

    def _machines(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _check_workers(self) -> None:
        """Ask every machine for its version of sbft, so that a mismatch is reported before any run fails."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        able = [node for node in self._ray.nodes() if node["Alive"] and room([node["Resources"]], self.needs)]
        asked = {
            self._ray.remote(num_cpus=0, max_retries=0)(ray_worker.introduce)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(): str(node["NodeManagerHostname"])
            for node in able
        }
        until = time.monotonic() + _INTRODUCTION_S
        for reference, host in asked.items():
            try:
                worker: Worker = self._ray.get(reference, timeout=max(until - time.monotonic(), 0))
            except self._ray.exceptions.GetTimeoutError:
                raise ClusterError(
                    f"The machine {host} of the Ray cluster did not answer within {_INTRODUCTION_S:.0f} s. Check `ray status` "
                    "there, and remove the machine from the cluster (ray stop) if it does not work."
                ) from None
            except self._ray.exceptions.RayError as error:
                raise ClusterError(_not_able(host, last_line(error))) from error
            if worker.version != sbft.__version__:
                raise ClusterError(_not_able(worker.host, f"it has sbft {worker.version}"))


@dataclass
class RemoteRun(Active):
    """A run that was submitted to a cluster."""

    cluster: Cluster
    order: Order
    suite_folder: Path
    say: Callable[[str], None]
    lost: list[str] = field(default_factory=list)
    """Why each earlier attempt was lost."""
    delivery: Delivery | None = None

    def __post_init__(self) -> None:
        self._reference = self.cluster.submit(self.order)
        self._waits = False

    @property
    def elapsed_s(self) -> float:
        """Seconds that its process took; until this is known, seconds since the run was submitted."""
        return super().elapsed_s if self.delivery is None else self.delivery.elapsed_s

    @property
    def exit_code(self) -> int | None:
        """The exit code of its process; None if none has ended."""
        return None if self.delivery is None else self.delivery.exit_code

    @property
    def cores(self) -> int | None:
        """Number of cores of the machine that made it."""
        return None if self.delivery is None else self.delivery.cores

    def shares_machine_with(self, runs: int) -> None:
        """Does nothing: only the machine that makes the run knows how many share it."""

    def has_ended(self) -> bool:
        """Whether its files have arrived, or never will. A lost run is submitted again, a few times."""
        if not self.cluster.has_ended(self._reference):
            self._tell_if_it_waits()
            return False
        try:
            delivery = self.cluster.receive(self._reference, self.folder)
        except Lost as loss:
            return self._has_given_up(loss)
        self.delivery = delivery
        self.timed_out, self.at_once = delivery.timed_out, delivery.at_once
        if delivery.unsupported is not None:
            write_unsupported(self.order.suite, self.suite_folder, self.run, delivery.unsupported)
        return True

    def kill(self) -> None:
        """Make its worker end the process, without waiting for a delivery."""
        self.cluster.cancel(self._reference)

    def wait(self) -> None:
        """Wait until the process has ended. If the worker does not end it, the worker is ended."""
        if not self.cluster.wait(self._reference):
            self.cluster.cancel(self._reference, force=True)
            self.cluster.wait(self._reference)

    def _has_given_up(self, loss: Lost) -> bool:
        """Submit the run again and return False; after too many losses record its failure and return True."""
        self.lost.append(str(loss))
        clear(self.folder)
        if len(self.lost) <= _RETRIES:
            self.say(f"{self.run.name}: {loss}; it starts again (retry {len(self.lost)} of {_RETRIES}).")
            self.began = time.monotonic()
            self._reference = self.cluster.submit(self.order)
            return False
        reasons = "; ".join(reason for reason, _ in itertools.groupby(self.lost))
        write_failure(
            self.order.suite,
            self.suite_folder,
            self.run,
            "oom" if loss.out_of_memory else "error",
            f"The Ray cluster lost this run {len(self.lost)} times before it had ended: {reasons}.",
        )
        return True

    def _tell_if_it_waits(self) -> None:
        if self.cluster.room:
            self._waits = False
        elif not self._waits:
            self._waits = True
            needs = self.cluster.needs
            gpus = f" and {needs.gpus} GPU" if needs.gpus else ""
            self.say(
                f"{self.run.name} is waiting: no machine of the cluster has {needs.cpus} CPUs{gpus}. Add one, or press "
                "Ctrl-C and type the same command again, which then asks for what the cluster has."
            )


def _make(order: Order) -> Delivery:
    """The Ray task that carries out an order."""
    import ray

    return ray_worker.make(order, ray.put, ray.get)


def _not_able(host: str, reason: str) -> str:
    return (
        f"The machine {host} of the Ray cluster cannot make runs: {reason.rstrip('.')}. Every machine requires sbft "
        f"{sbft.__version__} in the Python that Ray runs in."
    )
