"""Several processes of one run: one that is killed or hangs, what they agree on, and what accelerate launch tells them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sbft.cli.shared import launch, rank_errors
from sbft.cli.shared.errors import shown_as_a_paragraph
from sbft.errors import DataError, LostRankError, RecipeError, TrainingError
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.failures import failures_recorded
from sbft.runs.output_folder import RunFolder
from sbft.runs.processes import as_launched, over_processes
from sbft.runs.ranks import check_agreed, join_on_cpu, loss_of_a_rank
from sbft.runs.record import RunRecord
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

KILLED = "kill -9 $$"
LOST = "sleep 0.4; exit 2"
LEAVES = """echo '{{"message": "reason {}"}}' > $TORCHELASTIC_ERROR_FILE; exit {}"""
HANGS = "trap '' TERM; while :; do sleep 0.1; done"


# The launcher


@pytest.mark.parametrize(
    ("scripts", "code", "said"),
    [
        ((LOST, KILLED), 137, r"Process 1 of 2 was ended by signal 9 \(SIGKILL\), as .* memory runs out\.$"),
        ((KILLED, LOST), 137, r"Process 0 of 2 was ended by signal 9 \(SIGKILL\).*--resume continues from it\.$"),
        ((HANGS, KILLED), 137, r"Process 1 of 2 was ended by signal 9 \(SIGKILL\).*--resume continues from it\.$"),
        ((HANGS, "exit 3"), 3, r"Process 1 of 2 failed \(exit code 3\)\.$"),
        ((LOST, "exit 3"), 3, r"Process 1 of 2 failed \(exit code 3\)\.$"),
        ((LOST, LEAVES.format(1, 3)), 3, "Process 1 of 2 failed: reason 1$"),
        ((f"sleep 0.4; {LEAVES.format(0, 2)}", LEAVES.format(0, 2)), 2, "$"),  # rank 0 has reported the same
        (("sleep 0.4; exit 130", "exit 130"), 130, "$"),  # both were told to stop
        (("exit 2", "exit 2"), 2, "$"),
    ],
)
def test_the_launcher_names_the_rank_that_failed_first_and_ends_the_others(
    scripts: tuple[str, str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sh", "-c", scripts[int(environment["RANK"])]], env=environment))
        return started[-1]

    monkeypatch.setattr(launch, "start_rank", start)
    monkeypatch.setattr(launch, "_PATIENCE_S", 0.8)
    assert launch.launch(["train"], 2) == code
    assert re.match(f"(Error: )?{said}", capfd.readouterr().err.strip())
    assert all(process.returncode is not None for process in started)


def test_a_rank_leaves_its_error_for_what_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        with pytest.raises(typer.Exit), shown_as_a_paragraph(False):
            raise DataError("no rows") if rank == 0 else LostRankError("lost")
    # As torchrun reads it; torchrun could take a rank that has lost another for the cause.
    assert (
        ProcessFailure(0, 1, 2, str(tmp_path / "0.json")).message == "no rows" == rank_errors.left(tmp_path / "0.json")
    )
    assert [file.name for file in tmp_path.iterdir()] == ["0.json"]


def test_errors_are_told_once_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch.is_silent_in_errors()
    for rank, local_rank, silent in (("0", "0", False), ("1", "1", True), ("2", "0", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert launch.is_silent_in_errors() == silent


# Communication between ranks


@contextmanager
def two_ranks(other: Callable[[], None], timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Makes this process rank 0, and a fork of it rank 1, which is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    rank_1 = os.fork()
    if rank_1 == 0:
        try:
            os.environ["RANK"] = "1"
            join_on_cpu(60)
            other()
        finally:
            os._exit(1)
    try:
        join_on_cpu(timeout_s)
        yield rank_1
    finally:
        os.kill(rank_1, signal.SIGKILL)
        os.waitpid(rank_1, 0)
        torch.distributed.destroy_process_group()


def reduce() -> None:
    torch.distributed.all_reduce(torch.ones(1))


def killed() -> None:
    reduce()
    os.kill(os.getpid(), signal.SIGKILL)


def hanging() -> None:
    reduce()
    time.sleep(60)


@pytest.mark.parametrize(
    ("other", "timeout_s", "said"),
    [
        (killed, 60, "Process 0 of 2 has lost the connection to another, which has ended, crashed"),
        (
            hanging,
            2,
            r"Process 0 of 2 has waited 2 s for the others in vain \(training.ddp_timeout\): one of them, or .* hangs",
        ),
    ],
)
def test_a_lost_rank_is_told_of_with_the_checkpoint_to_go_on_from(
    other: Callable[[], None], timeout_s: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve(load_recipe(None, [f"training.ddp_timeout={timeout_s}"], model="m", data="d"))
    record = RunRecord(method="sbft", model="m", dataset="d", seed=0, world_size=2)
    output = RunFolder(tmp_path / "out", resume=False, main=True)
    begun = time.monotonic()
    with two_ranks(other, timeout_s, monkeypatch), pytest.raises(LostRankError, match=f"^{said}") as told:
        reduce()
        with failures_recorded(recipe, record, output):
            output.begin(recipe)
            checkpoint = tmp_path / "out" / "checkpoint-4"
            checkpoint.mkdir()
            (checkpoint / "trainer_state.json").write_text("{}")
            (checkpoint / "complete.json").write_text('{"trainer_state.json": 2}')
            reduce()
    assert time.monotonic() - begun < 30
    way = f"The last checkpoint, {checkpoint}, is intact. To resume from it, type: sbft train"
    assert way in str(told.value) and str(told.value).endswith("--resume --num-processes 2")
    assert RunRecord.load(tmp_path / "out").error == str(told.value)


def test_other_errors_are_not_taken_for_a_lost_rank() -> None:
    assert loss_of_a_rank(RuntimeError("shapes differ: the connection timed out"), 60) is None
    assert loss_of_a_rank(OSError("Connection reset by peer"), 60) is None
    assert "has waited 60 s" in str(loss_of_a_rank(torch.distributed.DistStoreError("wait timeout after 60 s"), 60))


def go_on_from_4() -> None:
    check_agreed(Path("out/checkpoint-4"))
    check_agreed(Path("out/checkpoint-4"))


def test_all_ranks_go_on_from_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    check_agreed(None)
    with two_ranks(go_on_from_4, 60, monkeypatch):
        check_agreed(Path("elsewhere/checkpoint-4"))
        with pytest.raises(
            TrainingError, match=r"different checkpoints: process 0 checkpoint-6, process 1 checkpoint-4\."
        ):
            check_agreed(Path("out/checkpoint-6"))


# accelerate launch


def given(*overrides: str) -> Recipe:
    return resolve(load_recipe(None, list(overrides), model="m", data="d"))


def accelerate(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Sets the environment of a process that `accelerate launch --num_processes 2` has started, and further variables."""
    usual = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}
    for name, value in {**usual, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_the_launch_configs_fsdp_becomes_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_launched(given()) == (given(), None)
    accelerate(monkeypatch)
    replicated = given("optimizer.gradient_release=false")
    assert as_launched(replicated) == (replicated, None)
    accelerate(monkeypatch, **FSDP2)
    for release in ("true", "false"):
        recipe, said = as_launched(given(f"optimizer.gradient_release={release}"))
        assert recipe == given(f"optimizer.gradient_release={release}", "distributed.fsdp_size=2")
        assert said == "The model is sharded over 2 processes, as accelerate's launch config asks"
        accelerate(monkeypatch, **FSDP2)
    as_launched(given())
    assert os.environ["ACCELERATE_USE_FSDP"] == os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    accelerate(monkeypatch, **FSDP2)
    own = given("distributed.fsdp_size=1", "distributed.dp_replicate_size=2")
    assert as_launched(own) == (own, None) and os.environ["ACCELERATE_USE_FSDP"] == "false"


@pytest.mark.parametrize("by_accelerate", [True, False])
def test_a_model_whose_gradients_are_released_is_sharded_over_the_processes_that_were_started(
    by_accelerate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    if by_accelerate:
        accelerate(monkeypatch)
    recipe, said = as_launched(given())
    assert recipe == given("distributed.fsdp_size=2")
    assert said is not None and "sharded over 2 processes (distributed.fsdp_size=2)" in said
    assert said.endswith("add --set optimizer.gradient_release=false")


def test_how_many_processes_a_recipe_is_spread_over_is_its_own_word() -> None:
    assert over_processes(given(), 1) == (given(), None)
    assert over_processes(given(), 4)[0] == given("distributed.fsdp_size=4")
    # Replicas average their gradients; recipes that are already distributed are left alone, even if the number differs.
    for overrides in (
        ["optimizer.gradient_release=false"], ["method=lora"], ["method=adam"],
        ["distributed.fsdp_size=2"], ["distributed.tp_size=4"],
    ):  # fmt: skip
        assert over_processes(given(*overrides), 4) == (given(*overrides), None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=muon"], "^2 processes .* m cannot be sharded with method muon. Add --set optimizer.gradient_release=f"),
        (["model=scratch:1m", "data.train=my.txt", "tokenizer=bpe:300"], "^2 processes .* scratch:1m cannot be sharded"),
        (["batch_schedule={doubling_examples: 4, largest: 8}"], "^The recipe has a batch_schedule, .* and 2 are asked"),
        (
            ["batch_schedule={doubling_examples: 4, largest: 8}", "optimizer.gradient_release=false"],
            "^The recipe has a batch_schedule, .* and 2 are asked",
        ),
    ],
)
def test_what_several_processes_cannot_train_is_refused_before_they_start(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        over_processes(given(*overrides), 2)


@pytest.mark.parametrize(
    ("variables", "overrides", "said"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            [],
            "asks for FSDP 1, .* fsdp_version: 2 .* distributed.fsdp_s",
        ),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, [], "has fsdp_offload_params: true"),
        (
            {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            [],
            "Set it to false, and write training.gradient_checkpointing: true",
        ),
        (FSDP2, ["method=qlora"], "distributed is given, but method qlora holds the model in 4 bits"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "asks for DeepSpeed, .* distributed.fsdp_size"),
    ],
)
def test_a_launch_config_that_asks_for_more_is_refused(
    variables: dict[str, str], overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate(monkeypatch, **variables)
    with pytest.raises(RecipeError, match=said):
        as_launched(given(*overrides))


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate(monkeypatch)
    monkeypatch.delenv("WORLD_SIZE")  # as accelerate launch --cpu --num_processes 2 leaves it
    with pytest.raises(RecipeError, match="has started only one: .* sbft train RECIPE --num-processes N, or: torchrun"):
        as_launched(given())


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_the_launch_configs_precision_is_refused_where_it_needs_a_loss_scaler(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ArgumentError, match=f"launch config has mixed_precision: {precision}, .* 'no' .* or bf16"):
        SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True).mixed_precision == "bf16"


def test_replicas_and_accelerates_plugin_are_refused_with_the_way_to_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = SmallBatchTrainer(model=tiny_model(), args=arguments)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ArgumentError, match="update each replica .* FSDP2 .* distributed.fsdp_size"):
        trainer._check_arguments()
    trainer.is_fsdp_enabled = True  # as accelerate's plugin sets it, only on GPUs
    with pytest.raises(ArgumentError, match=r"plugin .* too late for adafactor .* distributed.fsdp_size"):
        trainer._check_arguments()
