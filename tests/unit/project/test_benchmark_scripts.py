"""benchmarks/optimizer_step.py on a few small tensors, the shapes it knows, and benchmarks/training_step.py."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer_step as optimizer_step_script
from benchmarks.shapes import parameter_shapes
from tests.tiny import save_tiny, tiny_model

# They time real processes; the tools they measure with are tested with the parts of sbft.
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
KEYS = {
    "optimizer", "backend", "device", "dtype", "parameters", "median_ms", "copy_bound_ms", "ratio", "temporary_bytes",
    "skipped",
}  # fmt: skip


def test_shapes_by_name_by_folder_and_by_size(tmp_path: Path) -> None:
    assert parameter_shapes("4096x11008") == [(4096, 11008)] and parameter_shapes("64") == [(64,)]
    assert sum(math.prod(shape) for shape in parameter_shapes("smollm2-135m")) == 134_515_008
    folder = save_tiny(tmp_path / "model", "qwen3")
    assert parameter_shapes(str(folder)) == [tuple(p.shape) for p in tiny_model("qwen3").parameters()]


def optimizer_step(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "optimizer_step.py", "--json", folder / "rows.json", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)


def test_optimizer_step_writes_a_row_for_every_optimizer(tmp_path: Path) -> None:
    optimizers = ["sbft Adafactor, SR", "sbft Adafactor, SR, reference", "torch AdamW, fused", "lomo-optim AdaLomo"]
    finished = optimizer_step(
        tmp_path, "--model", "130x140", "64", "--rounds", 2, "--steps", 1, "--optimizers", *optimizers
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["optimizer"] for row in rows] == optimizers
    for row in rows:
        assert set(row) >= KEYS
        assert row["parameters"] == 130 * 140 + 64 and row["dtype"] == "bfloat16" and row["copy_bound_ms"] > 0
        assert row["optimizer"] in finished.stdout
        if row["skipped"] is None:
            assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert row["ratio"] == pytest.approx(row["median_ms"] / row["copy_bound_ms"])
            assert row["temporary_bytes"] >= 0
        else:
            assert row["median_ms"] is row["ratio"] is None and row["skipped"] in finished.stdout
    assert rows[1]["backend"] == "reference"
    assert [row["skipped"] for row in rows[:3]] == [None] * 3
    if not torch.cuda.is_available():
        assert rows[3]["skipped"]  # requires a GPU, or is not installed


def test_who_needs_too_long_for_the_first_step_is_skipped_by_name(tmp_path: Path) -> None:
    # torchao compiles in its first step, and takes that in a process of its own; SGD takes it in this one.
    optimizers = ["torch SGD"] + ["torchao AdamW8bit"] * (importlib.util.find_spec("torchao") is not None)
    finished = optimizer_step(
        tmp_path, "--model", "64x64", "--rounds", 1, "--steps", 1, "--limit-s", 1e-6, "--optimizers", *optimizers
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["optimizer"] for row in rows] == optimizers
    for row in rows:
        assert set(row) >= KEYS and row["median_ms"] is row["ratio"] is row["temporary_bytes"] is None
        assert row["skipped"] == "its first step took longer than 1e-06 s"
        assert f"{row['optimizer']}: {row['skipped']}" in finished.stderr and row["skipped"] in finished.stdout


def test_a_probe_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(model=["8x8"], dtype="bfloat16", limit_s=60.0)
    assert optimizer_step_script.probe("torch SGD", arguments) is None
    if not torch.cuda.is_available():
        why = optimizer_step_script.probe("lomo-optim AdaLomo", arguments)
        assert why is not None and "Error: " in why  # requires a GPU, or is not installed
    monkeypatch.setattr(sys, "executable", "false")
    assert optimizer_step_script.probe("torch SGD", arguments) == "exit code 1"


def test_a_probe_that_hangs_is_stopped_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho begins\n(sleep 1; touch {tmp_path}/survived) &\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    arguments = argparse.Namespace(model=["8x8"], dtype="bfloat16", limit_s=0.2)
    assert optimizer_step_script.probe("torch SGD", arguments) == "its first step took longer than 0.2 s"
    time.sleep(1.5)
    assert not (tmp_path / "survived").exists()


@pytest.mark.slow
def test_training_step_measures_every_method(tmp_path: Path) -> None:
    methods = ["sbft-frozen-embeddings", "adam"]
    command = [sys.executable, ROOT / "benchmarks" / "training_step.py", "--model", "tiny", "--tokens", "16"]
    command += ["--steps", "1", "--warm-up", "1", "--repeats", "1", "--json", tmp_path / "rows.json"]
    finished = subprocess.run([*map(str, command), "--methods", *methods], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == methods and all(row["failed"] is None for row in rows.values())
    weights = sum(math.prod(shape) for shape in parameter_shapes("tiny"))
    for row, trained in zip(rows.values(), (weights - 512 * 160, weights), strict=True):
        assert row["parameters"] == weights and row["trainable_parameters"] == trained
        assert row["step_ms"] > row["optimizer_ms"] > 0 and row["peak_bytes"] > 0 and row["tokens"] == 16
