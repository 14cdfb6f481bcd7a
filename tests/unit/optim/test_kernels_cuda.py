"""The Triton kernels: in the interpreter, on a GPU if there is one, and compiled for a GPU without having one.

Each runs in a process of its own: Triton decides when it is imported whether it interprets, for all tests of a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def run(cases: str, cache: Path, *options: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/unit/optim/{cases}.py", *options]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "TRITON_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]


@pytest.mark.long
def test_in_the_interpreter(tmp_path: Path) -> None:
    run("cuda_cases", tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.long
def test_grids_in_the_interpreter(tmp_path: Path) -> None:
    run("cuda_grid_cases", tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


def test_shared_launches_in_the_interpreter(tmp_path: Path) -> None:
    few = "after_backward_nothing_waits"
    run("cuda_together_cases", tmp_path, "-k", few, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.long
def test_all_of_shared_launches_in_the_interpreter(tmp_path: Path) -> None:
    run("cuda_together_cases", tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.parametrize("cases", ["cuda_cases", "cuda_grid_cases", "cuda_together_cases"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(tmp_path: Path, cases: str) -> None:
    run(cases, tmp_path)


@pytest.mark.long
def test_compiled_for_hopper(tmp_path: Path) -> None:
    run("cuda_compilation", tmp_path)
