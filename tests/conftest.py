"""Fixtures for all tests: a tiny checkpoint on disk, and no access to a model hub."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Set before any library that reads them is imported: a test must neither reach nor wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the longest tests unless they were asked for."""
    if os.environ.get("SBFT_LONG_TESTS") != "1":
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="a long check: set SBFT_LONG_TESTS=1"))


def pytest_collection_finish() -> None:
    """All modules are imported by now: freeze them, so that the garbage collections of every run need not walk them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer; read-only."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must pass on every CPU; the warning that bfloat16 is slow on this one has tests of its own."""
    monkeypatch.setattr("sbft.planning.check.processor.multiplies_bfloat16", lambda: True)
