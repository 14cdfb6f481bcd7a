"""Runs on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbft.bench import outcome, process
from sbft.bench.active_run import Active, Place
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run


@dataclass(frozen=True)
class ThisMachine(Place):
    """Makes each run in a process on this machine, with one GPU or a share of the CPU."""

    jobs: int = 1
    gpus: Sequence[str] = ()
    """The name of each GPU in CUDA_VISIBLE_DEVICES; each run gets one. Empty: the runs share the CPU."""

    def missing_package(self, suite: Suite, variant: str) -> str | None:
        """Why a variant cannot be run here, if a package that its method needs is not installed."""
        return outcome.missing_package(suite, variant)

    def start(
        self, suite: Suite, folder: Path, run: Run, *, lock: int, slot: int, say: Callable[[str], None]
    ) -> Active:
        """Start the process of a run: see `Place`."""
        return process.start(suite, folder, run, lock=lock, slot=slot, environment=self._environment(slot))

    def _environment(self, slot: int) -> dict[str, str]:
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.jobs, 1))}
