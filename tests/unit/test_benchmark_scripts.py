"""benchmarks/optimizer_step.py on a few small tensors, and the shapes it knows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import parameter_shapes

ROOT = Path(__file__).parents[2]
KEYS = {
    "optimizer", "backend", "device", "dtype", "parameters", "median_ms", "copy_bound_ms", "ratio", "temporary_bytes",
    "skipped",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("4096x11008", 45_088_768),
    ],
)
def test_shapes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    assert sum(math.prod(shape) for shape in parameter_shapes(name)) == parameters


def test_optimizer_step_writes_a_row_for_every_optimizer(tmp_path: Path) -> None:
    optimizers = ["sbft Adafactor, SR", "sbft Adafactor, SR, reference", "torch AdamW, fused", "lomo-optim AdaLomo"]
    command = [sys.executable, ROOT / "benchmarks" / "optimizer_step.py", "--model", "130x140", "64", "--rounds", "2"]
    command += ["--steps", "1", "--json", tmp_path / "rows.json", "--optimizers", *optimizers]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
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
        assert rows[3]["skipped"]  # asks for a GPU, or is not installed
