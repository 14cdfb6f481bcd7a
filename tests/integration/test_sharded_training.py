"""One model over two processes (FSDP2, gloo), against the same training in one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sbft.errors import RecipeError
from sbft.fine_tuning import run
from sbft.recipe import load_recipe
from tests.integration import sharded_worker
from tests.integration.sharded_worker import BATCH, CASES
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PATIENCE_S = 240


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sharded_worker.save_models(folder)
    return folder


@pytest.fixture(scope="module")
def in_two(models: Path) -> dict[str, Any]:
    """What every case comes to in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.sharded_worker", str(models)],
            env={
                **os.environ,
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            },
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=PATIENCE_S)
        assert rank.returncode == 0, said[-3000:]
    return {name: torch.load(models / f"{name}.pt", weights_only=False) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_weights_of_one(name: str, models: Path, in_two: dict[str, Any]) -> None:
    alone, together = sharded_worker.train(name, models, 1), in_two[name]
    assert together["sharded"] == together["parameters"] and together["logits_free"] and alone["logits_free"]
    assert together["tokens"] == alone["tokens"] == sum(9 + 3 * (i % 5) for i in range(sharded_worker.STEPS * BATCH))
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    start = load_file(models / name / "model.safetensors")
    assert together["weights"].keys() == alone["weights"].keys()
    for parameter, expected in alone["weights"].items():
        # Sums in float32 in another order; what training has changed is thousands of times as much.
        largest = expected.abs().max()
        assert (together["weights"][parameter] - expected).abs().max() <= 1e-5 * largest
        assert (expected - start[parameter]).abs().max() > 1e-3 * largest


def test_a_tied_embedding_that_does_not_divide_by_the_processes_is_refused(
    models: Path, in_two: dict[str, Any]
) -> None:
    for rank in range(2):
        said = (models / f"refusal-{rank}.txt").read_text()
        assert "its 513 rows do not divide by the 2 processes" in said and "of which one is not trained" in said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    content = {
        "model": str(save_tiny(folder / "model", "qwen3", hidden=128)),
        "data": {
            "train": "generated:random_text",
            "options": {"length": 30},
            "train_size": 16,
            "eval": "generated:random_text",
            "eval_size": 2,
            "max_length": 32,
            "allow_overlap": True,
        },
        "training": {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2},
        "optimizer": {"stochastic_rounding": False},
        "dtype": "float32",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_sharded_run_is_gone_on_with_in_one_process(recipe: Path, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    settings = ["training.per_device_train_batch_size=2", "distributed.fsdp_size=2"]
    command = [sys.executable, "-m", "sbft", "train", str(recipe), "--output-dir", str(two), "--num-processes", "2"]
    done = subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((two / "run.json").read_text())
    assert (record["status"], record["world_size"], record["steps"]) == ("ok", 2, 4) and record["metrics"]["loss"] > 0
    trained = load_file(two / "model.safetensors")
    config = json.loads((two / "config.json").read_text())
    assert "distributed_config" not in config

    # As if it had been stopped after two steps: from there on alone, four examples a step.
    shutil.copytree(two, one)
    shutil.rmtree(one / "checkpoint-4")
    (one / "model.safetensors").unlink()
    (one / "recipe.yaml").write_text((one / "recipe.yaml").read_text().replace(str(two), str(one)))
    record["status"], record["error"] = "error", "stopped"
    (one / "run.json").write_text(json.dumps(record))
    changes = [f"output_dir={one}", "training.per_device_train_batch_size=4"]
    resumed = run(load_recipe(str(recipe), changes), resume=True)
    assert (resumed.status, resumed.steps, resumed.tokens) == ("ok", 4, record["tokens"])
    for name, weight in load_file(one / "model.safetensors").items():
        assert (weight - trained[name]).abs().max() <= 1e-5 * weight.abs().max()


def test_as_many_processes_are_needed_as_the_model_is_sharded_over(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"over 2 processes, and there is 1\. Add --num-processes 2, or start"):
        run(load_recipe(str(recipe), ["distributed.fsdp_size=2", f"output_dir={tmp_path / 'out'}"]))


def test_adapters_are_not_sharded(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="distributed is given, but method lora trains an adapter"):
        load_recipe(str(recipe), ["method=lora", "distributed.fsdp_size=2"])
