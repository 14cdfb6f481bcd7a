"""A pytest plugin, `-p conformance.plugin`: before a test module is imported, sbft's trainers take the place of the library's.

`CONFORMANCE_MODE` is a mode of `swap.put_in_place`, or `baseline` to change nothing; `CONFORMANCE_LIBRARY` says whose
trainers to replace. `CONFORMANCE_HUB` may name a folder that `tiny_hub` filled, and `CONFORMANCE_ONLY` a file with the
tests to run instead of all.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from conformance import local_hub, removed_names, results, swap

MODE = os.environ["CONFORMANCE_MODE"]


def pytest_configure(config: pytest.Config) -> None:
    hub = os.environ.get("CONFORMANCE_HUB")
    if hub:
        local_hub.use(Path(hub))
    if MODE != "baseline":
        swap.put_in_place(MODE, os.environ["CONFORMANCE_LIBRARY"])


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Without this, a checkout older than the installed library would lose whole files of tests, which import removed names."""
    if isinstance(collector, pytest.Module) and collector.path.suffix == ".py":
        removed_names.stand_in_for(collector.path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = os.environ.get("CONFORMANCE_ONLY")
    if file:
        names = set(Path(file).read_text().splitlines())
        left_out = [item for item in items if results.name_of(item.nodeid) not in names]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if results.name_of(item.nodeid) in names]


def pytest_collection_finish() -> None:
    """Everything is imported by now. TRL's tests each collect garbage, which then need not walk all of that every time."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return f"conformance: {MODE}"
