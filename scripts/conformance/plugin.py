"""A pytest plugin, `-p conformance.plugin`: before a test module is imported, sbft's trainers take the place of the library's.

`CONFORMANCE_MODE` says how (as `swap.put_in_place` takes it, or baseline for not at all), `CONFORMANCE_LIBRARY` whose trainers.
`CONFORMANCE_HUB` names a folder that `tiny_hub` filled; without it nothing is looked up there. `CONFORMANCE_ONLY` names a file
with the tests to run; all without it.
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
    """A checkout older than the installed library imports names that are gone, and would lose whole files of tests."""
    if isinstance(collector, pytest.Module) and collector.path.suffix == ".py":
        removed_names.stand_in_for(collector.path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = os.environ.get("CONFORMANCE_ONLY")
    if chosen:
        names = set(Path(chosen).read_text().splitlines())
        left_out = [item for item in items if results.name_of(item.nodeid) not in names]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if results.name_of(item.nodeid) in names]


def pytest_collection_finish() -> None:
    """All is imported: collections, of which TRL's tests make one each, need not walk it every time."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    return f"conformance: {MODE}"
