"""Shared by the scripts in this folder: a run of a tiny model by the real `sbft train`, in a process that can be killed.

The process is a fork of one that has already imported everything: it starts in a quarter of a second, not in eight.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Threads do not survive a fork, and results must not depend on how many there are.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")

import peft  # noqa: E402, F401, imported once, here, for all processes
import torch  # noqa: E402
import transformers.trainer  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402

from sbft.cli.app import app  # noqa: E402
from sbft.native.memory import device_name  # noqa: E402
from sbft.runs import run_recipe  # noqa: E402, F401
from sbft.runs.record import git_commit, versions  # noqa: E402
from tests.tiny import save_tiny  # noqa: E402

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(48)]


def write_recipe(folder: Path, steps: int, kind: str = "gpt2", **changes: Any) -> Path:
    """Write a tiny model, data, and a recipe that saves a checkpoint at every step and keeps two.

    Args:
        folder: where everything is written.
        steps: number of steps of the run.
        kind: kind of model; gpt2 has dropout.
        changes: further keys of the recipe.
    """
    model = save_tiny(folder / "model", kind, hidden=256, layers=4)
    for name, rows in (("train", ROWS[:40]), ("test", ROWS[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "test.jsonl")},
        "training": {
            "max_steps": steps,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
        },
        "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 4},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def start(log: Path, work: Callable[[], int]) -> int:
    """Do some work in a process of its own; returns the process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(recipe: Path, out: Path, *flags: str) -> int:
    """Run `sbft train`; returns its exit code."""
    return command("train", str(recipe), "--output-dir", str(out), *flags)


def command(*arguments: str) -> int:
    """Run a command of sbft; returns its exit code."""
    torch.set_num_threads(1)
    try:
        app([*arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def end_of(process: int) -> int:
    """Wait for a process; returns its exit code, or minus the signal if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit by bit, the same numbers of steps and tokens, and the same metrics."""
    records = [json.loads((folder / "run.json").read_text()) for folder in (one, other)]
    return same_weights(one, other) and all(
        records[0][key] == records[1][key] for key in ("status", "steps", "tokens", "metrics")
    )


def same_weights(one: Path, other: Path) -> bool:
    """Whether the models in two folders are the same, bit by bit."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(_bits(found[name]), _bits(expected[name]))
        for name in expected
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result as JSON, with the device, versions and commit it was measured on."""
    if path is not None:
        whole = {**result, "device": device_name(), "versions": versions(), "git_commit": git_commit()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=2) + "\n")
