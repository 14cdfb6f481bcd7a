"""Fixtures for all tests: a tiny checkpoint on disk, and a world without a model hub."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Before anything imports the libraries that read these: a test must neither reach nor wait for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the longest checks out where nobody asked for them."""
    if os.environ.get("SBFT_LONG_TESTS") != "1":
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="a long check: set SBFT_LONG_TESTS=1"))


def pytest_collection_finish() -> None:
    """All modules are imported: garbage collections, of which every run makes some, need not walk them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer; to be read, not written."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests hold on every CPU: that bfloat16 is slow on this one is a warning with tests of its own."""
    monkeypatch.setattr("sbft.planning.check.processor.multiplies_bfloat16", lambda: True)
