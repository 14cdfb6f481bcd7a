"""One model over two or four processes (FSDP2, tensor parallelism, gloo), against the same training in one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sbft.errors import RecipeError
from sbft.models.load import missing_for_sharding
from sbft.models.tensor_files import TensorFiles, write_shards
from sbft.recipe import load_recipe
from sbft.runs.run_recipe import run
from sbft.training.checkpointing.checkpoints import damage
from tests.integration import sharded_worker
from tests.integration.sharded_worker import BATCH, BY_FOUR, CASES, CHOSEN, RESUMED, SAVING, TENSOR_PARALLEL
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(missing_for_sharding() is not None, reason=missing_for_sharding() or ""),
]
ROOT = Path(__file__).parents[2]
PATIENCE_S = 480


@contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Whether this process has to fill a folder; other workers of the session wait until it has."""
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Each worker has its own folder within that of the session.
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "sharded"
    with made_once(folder) as mine:
        if mine:
            sharded_worker.save_models(folder)
            sharded_worker.train(RESUMED, folder, 1, out="one", **SAVING)
    return folder


@pytest.fixture(scope="module")
def in_two(models: Path) -> dict[str, Any]:
    """Results of every case in two processes."""
    return trained_together(models, 2)


@pytest.fixture(scope="module")
def in_four(models: Path) -> dict[str, Any]:
    """Results of every case in four processes."""
    return trained_together(models, 4)


def trained_together(models: Path, processes: int) -> dict[str, Any]:
    with made_once(models / f"in-{processes}") as mine:
        if mine:
            train_together(models, processes)
    results: dict[str, Any] = torch.load(models / f"{processes}.pt", weights_only=True)
    return results


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def train_together(models: Path, processes: int) -> None:
    """Train the cases in several processes, which write the results next to the models."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.sharded_worker", str(models)],
            env={
                **os.environ,
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            },
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=PATIENCE_S)
            assert rank.returncode == 0, said[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


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
        # float32 sums in a different order; training has changed the weights thousands of times as much.
        largest = expected.abs().max()
        assert (together["weights"][parameter] - expected).abs().max() <= 1e-5 * largest
        assert (expected - start[parameter]).abs().max() > 1e-3 * largest


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Assert equality up to a tolerance, relative to the largest number of a tensor."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= tolerance * weight.abs().max()


def test_checkpoints_are_gone_on_from_by_any_number_of_processes(models: Path, in_two: dict[str, Any]) -> None:
    straight, alone = in_two["straight"], sharded_worker.train(RESUMED, models, 1, out="alone")
    assert_same(in_two["resumed"]["weights"], straight["weights"])
    assert_same(in_two["from one"]["weights"], alone["weights"], 1e-5)
    resumed = sharded_worker.train(RESUMED, models, 1, out="resumed alone", resume=models / "several" / "checkpoint-2")
    assert_same(resumed["weights"], alone["weights"], 1e-5)
    assert {one["tokens"] for one in (resumed, in_two["resumed"], in_two["from one"])} == {alone["tokens"]}
    # Without the optimizer's state the figures would be different.
    shutil.copytree(models / "several" / "checkpoint-2", models / "forgotten", ignore=lambda *_: ["optimizer"])
    forgotten = sharded_worker.train(RESUMED, models, 1, out="out", resume=models / "forgotten")
    with pytest.raises(AssertionError):
        assert_same(forgotten["weights"], alone["weights"], 1e-5)


def test_replicas_that_accumulate_end_with_the_weights_of_one(models: Path, in_two: dict[str, Any]) -> None:
    alone, together = sharded_worker.train("gradients kept", models, 1), in_two["replicas"]
    assert together["sharded"] == 0 and together["logits_free"]
    assert together["tokens"] == alone["tokens"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert_same(together["weights"], alone["weights"], 1e-5)


def test_an_adapter_on_a_sharded_model_ends_as_on_a_whole_one(models: Path, in_two: dict[str, Any]) -> None:
    alone, together = sharded_worker.train("an adapter", models, 1, **SAVING), in_two["adapter"]
    assert together["sharded"] == together["parameters"] - len(together["weights"]) > 0 and together["logits_free"]
    assert together["tokens"] == alone["tokens"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert_same(together["weights"], alone["weights"], 1e-5)
    # One factor of each adapter starts at zero, so a difference in the other hardly shows until it has grown.
    assert all(weight.abs().max() > 1e-4 for weight in alone["weights"].values())
    assert_same(in_two["adapter resumed"]["weights"], together["weights"])
    assert_same(in_two["adapter accumulated"]["weights"], alone["weights"], 1e-5)
    for name in ("adapter", "adapter resumed", "adapter accumulated"):
        assert_same(torch.load(models / f"{name} of the last rank.pt"), in_two[name]["weights"])
        assert in_two[name]["hooks"] == 0
    half = models / "adapter" / "checkpoint-2"
    assert (half / "adapter_model.safetensors").is_file() and not [*half.glob("shard-*"), *half.glob("model*")]
    assert_same(sharded_worker.train("an adapter", models, 1, resume=half)["weights"], alone["weights"], 1e-5)


def test_gradients_of_an_adapter_that_all_processes_have_are_not_released(in_two: dict[str, Any]) -> None:
    said = in_two["adapter released"]
    assert "2 processes would update each replica from its own gradient" in said
    assert said.endswith("the weights that are trained are whole on every process. Set gradient_release=False.")


def test_a_loss_that_is_nan_on_one_process_is_left_out_by_all(models: Path, in_two: dict[str, Any]) -> None:
    alone, together = sharded_worker.train(RESUMED, models, 1, spoiled=True), in_two["spoiled"]
    assert (together["skipped"], together["tokens"]) == (1, alone["tokens"]) and alone["tokens"] < in_two["straight"][
        "tokens"
    ]
    assert_same(together["weights"], alone["weights"], 1e-5)
    # The checkpoint right after it, when FSDP2 still held gathered weights that no backward had freed.
    half = models / "spoiled" / "checkpoint-2"
    assert_same(sharded_worker.train(RESUMED, models, 1, resume=half)["weights"], alone["weights"], 1e-5)


def test_a_batch_that_is_packed_on_one_process_does_not_make_the_others_wait(in_two: dict[str, Any]) -> None:
    assert 5 < in_two["packed on one"] < 8


IN_FOUR = pytest.param(4, marks=pytest.mark.long)


@pytest.mark.parametrize("processes", [2, IN_FOUR])
def test_processes_round_alike(processes: int, models: Path, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue("in_two" if processes == 2 else "in_four")["rounded alike"]
    assert len(found) == 5 and all(found.values()), found


@pytest.mark.parametrize("name", [*TENSOR_PARALLEL, "tied and uneven"])
def test_two_processes_that_share_every_matrix_end_with_the_weights_of_one(
    name: str, models: Path, in_two: dict[str, Any]
) -> None:
    alone, together = sharded_worker.train(name, models, 1), in_two[f"{name}, by tensors"]
    assert 0 < together["sharded"] < together["parameters"] and together["logits_free"]
    # Both processes have seen the same examples, which count once.
    assert together["tokens"] == alone["tokens"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert_same(together["weights"], alone["weights"], 1e-5)
    assert_same(torch.load(models / f"{name} of the last rank.pt"), together["weights"])
    if name == RESUMED:
        half = models / f"{name} by tensors" / "checkpoint-2"
        assert_same(
            sharded_worker.train(name, models, 1, out="once more", resume=half)["weights"], alone["weights"], 1e-5
        )


@pytest.mark.long
@pytest.mark.parametrize("name", BY_FOUR)
def test_four_processes_end_with_the_weights_of_one(name: str, models: Path, in_four: dict[str, Any]) -> None:
    case = BY_FOUR[name]["case"]
    alone, together = sharded_worker.train(case, models, 1), in_four[name]
    assert together["sharded"] == together["parameters"] and together["logits_free"]
    # Processes that share the matrices have seen the same examples, which count once.
    assert together["tokens"] == alone["tokens"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert_same(together["weights"], alone["weights"], 1e-5)
    # Resumed from a checkpoint in four processes, and in one.
    assert_same(in_four[f"{name}, resumed"]["weights"], together["weights"])
    assert damage(models / name / "checkpoint-4") is None
    resumed = sharded_worker.train(case, models, 1, out=f"{name} alone", resume=models / name / "checkpoint-2")
    assert_same(resumed["weights"], alone["weights"], 1e-5)
    if case == RESUMED:
        assert_same(in_four["from one"]["weights"], alone["weights"], 1e-5)
    # As sbft export reads it.
    (models / f"{name} exported").mkdir()
    write_shards(TensorFiles(models / name / "checkpoint-4"), models / f"{name} exported", None, 2**30)
    exported = load_file(models / f"{name} exported" / "model.safetensors")
    assert_same({key: exported[key] for key in together["weights"]}, together["weights"])


def test_a_model_that_cannot_be_cut_into_matrices_is_refused(in_two: dict[str, Any]) -> None:
    said = in_two["no plan"]
    assert "cannot be split by distributed.tp_size: transformers has no plan for splitting a GPT2LMHeadModel" in said
    assert said.endswith("Leave it out, and write fsdp_size to shard its weights.")


def test_every_process_writes_its_part_and_the_mark_covers_all(models: Path, in_two: dict[str, Any]) -> None:
    checkpoint = models / "several" / "checkpoint-4"
    parts = sorted(checkpoint.glob("shard-*.safetensors"))
    whole = sum(weight.nbytes for weight in in_two["straight"]["weights"].values())
    assert len(parts) == 2 and all(path.stat().st_size < 0.6 * whole for path in parts)
    noted = json.loads((checkpoint / "complete.json").read_text())
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert noted.keys() == there - {"complete.json"} and {"rng_state_0.pth", "rng_state_1.pth"} < there
    assert damage(checkpoint) is None
    for rank in range(2):
        path = parts[rank]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert damage(checkpoint, share=(0, 2)) or damage(checkpoint, share=(1, 2))
        content[-1] ^= 1
        path.write_bytes(content)
    # As transformers itself reads it.
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same(dict(model.named_parameters()), in_two["straight"]["weights"])
    # As sbft export does.
    (models / "exported").mkdir()
    write_shards(TensorFiles(checkpoint), models / "exported", None, 2**30)
    assert_same(load_file(models / "exported" / "model.safetensors"), in_two["straight"]["weights"])


def test_a_pushed_checkpoint_is_the_whole_model_and_can_be_gone_on_from(models: Path, in_two: dict[str, Any]) -> None:
    for step in (2, 4):
        commit, parts = models / "hub" / f"Training in progress, step {step}", models / "pushed" / f"checkpoint-{step}"
        model = AutoModelForCausalLM.from_pretrained(commit, dtype=torch.float32)
        expected = AutoModelForCausalLM.from_pretrained(parts, dtype=torch.float32)
        assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
        assert not [*commit.glob("shard-*"), *commit.glob("incomplete*"), *commit.glob("checkpoint-*")]
        last = models / "hub" / f"Training in progress, step {step}, checkpoint" / "last-checkpoint"
        assert damage(last) is None
    assert_same(dict(model.named_parameters()), in_two[CHOSEN]["weights"])


def test_the_best_checkpoint_of_a_sharded_run_is_kept_and_becomes_the_model(
    models: Path, in_two: dict[str, Any]
) -> None:
    folder = models / "best"
    names = {path.name for path in folder.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4"} and os.readlink(folder / "latest") == "checkpoint-4"
    stopped = sharded_worker.train(CHOSEN, models, 1, out="stopped", max_steps=2)
    assert_same(in_two["best"]["weights"], stopped["weights"], 1e-5)


def test_a_disk_that_is_full_for_one_process_is_said_by_all(models: Path, in_two: dict[str, Any]) -> None:
    for rank in range(2):
        said = (models / f"full-{rank}.txt").read_text()
        assert (
            said.startswith("The checkpoint of step 4 could not be written") and "larger than this process may" in said
        )
    assert {path.name for path in (models / "full").iterdir()} == {"checkpoint-2", "latest"}
    assert damage(models / "full" / "checkpoint-2") is None


def test_that_there_is_no_room_for_a_push_is_said_by_all(models: Path, in_two: dict[str, Any]) -> None:
    for rank in range(2):
        said = (models / f"full at a push-{rank}.txt").read_text()
        assert said.startswith("The trained model could not be written") and "no space is left there" in said
    assert damage(models / "full at a push" / "checkpoint-2") is None


@pytest.mark.parametrize(("processes", "rows"), [(2, 513), pytest.param(4, 514, marks=pytest.mark.long)])
def test_a_tied_embedding_that_does_not_divide_by_the_processes_is_refused(
    processes: int, rows: int, models: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("in_two" if processes == 2 else "in_four")
    for rank in range(processes):
        said = (models / f"refusal of {processes}-{rank}.txt").read_text()
        assert f"its {rows} rows are not divisible by the {processes} processes" in said
        assert "one of which is not trained" in said


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


def by_num_processes(command: list[str]) -> list[list[str]]:
    return [[sys.executable, "-m", *command, "--num-processes", "2"]]


def by_torchrun_on_two_nodes(command: list[str]) -> list[list[str]]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    at = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    return [
        [*torchrun, *at, "--node-rank", str(node), "-m", *command, "--set", "distributed.fsdp_size=2"]
        for node in range(2)
    ]


def by_torchrun(command: list[str]) -> list[list[str]]:
    return [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *command]]


def by_accelerate_with_fsdp(command: list[str]) -> list[list[str]]:
    # accelerate's config asks for sharding; the recipe does not.
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    config = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [
        [*accelerate, *config, "--use_fsdp", "--fsdp_version", "2", "--main_process_port", free_port(), "-m", *command]
    ]


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(by_num_processes, marks=pytest.mark.long),
        pytest.param(by_torchrun, marks=pytest.mark.long),
        pytest.param(by_torchrun_on_two_nodes, marks=pytest.mark.long),
        pytest.param(by_accelerate_with_fsdp, marks=pytest.mark.long),
    ],
)
def test_a_sharded_run_is_gone_on_with_in_one_process(
    launch: Callable[[list[str]], list[list[str]]], recipe: Path, tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    command = [
        "sbft",
        "train",
        str(recipe),
        "--output-dir",
        str(two),
        "--set",
        "training.per_device_train_batch_size=2",
    ]
    started = [
        subprocess.Popen(
            whole,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for whole in launch(command)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.terminate()
    record = json.loads((two / "run.json").read_text())
    assert (record["status"], record["world_size"], record["steps"]) == ("ok", 2, 4) and record["metrics"]["loss"] > 0
    # Whether the recipe, the launch config, or only the number of processes asks for sharding.
    assert record["recipe"]["distributed"] == {"fsdp_size": 2}
    assert yaml.safe_load((two / "recipe.yaml").read_text())["distributed"] == {"fsdp_size": 2}
    trained = load_file(two / "model.safetensors")
    config = json.loads((two / "config.json").read_text())
    assert "distributed_config" not in config

    # As if it had been stopped after two steps: resumed in one process, with four examples per step.
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
    for key in ("fsdp_size", "tp_size"):
        with pytest.raises(RecipeError, match=r"over 2 processes, and there is 1\. Add --num-processes 2, or start"):
            run(load_recipe(str(recipe), [f"distributed.{key}=2", f"output_dir={tmp_path / 'out'}"]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["method=qlora", "distributed.fsdp_size=2"],
            "distributed is given, but method qlora holds the model in 4 bits",
        ),
        (["method=lora", "distributed.tp_size=2"], "tp_size is 2, but method lora trains an adapter.* Write fsdp_size"),
        (["method=lora", "distributed.fsdp_size=2", "lora.dora=true"], "DoRA requires the norms of whole matrices"),
        (
            ["method=lora", "distributed.tp_size=2", "lora.dora=true"],
            r"(?s)tp_size is 2, but method lora.*DoRA requires the norms",
        ),
    ],
)
def test_adapters_that_need_a_whole_model_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, overrides, model="m", data="d")
