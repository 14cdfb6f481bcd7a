"""How a run ends early: what counts as out of memory, what is advised, what is written, and when Ctrl-C is heard."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from sbft.cli.shared.launch import _end, _wait, launch
from sbft.errors import DataError, DiskError, TrainingError
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.failures import (
    evaluation_advice,
    failures_recorded,
    is_out_of_memory,
    training_advice,
)
from sbft.runs.interrupt import StopBetweenSteps
from sbft.runs.output_folder import RunFolder, check_output_folder
from sbft.runs.record import RunRecord

GIB = 2**30


def given(*overrides: str) -> Recipe:
    return resolve(load_recipe(None, list(overrides), model="m", data="d"))


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("overrides", "memory", "largest", "switch"),
    [
        ([], {"weights": 1, "gradients": 1, "optimizer_state": 0}, "activations", "gradient_checkpointing=true"),
        (["training.gradient_checkpointing=true"], {"weights": 1}, "activations", "data.max_length=512"),
        (["training.per_device_train_batch_size=4"], {"weights": 1}, "activations", "per_device_train_batch_size=1"),
        (["method=adam"], {"weights": 4, "gradients": 4, "optimizer_state": 8}, "optimizer's state", "method=sbft"),
        (["optimizer.gradient_release=false"], {"weights": 1, "gradients": 9}, "gradients", "gradient_release=true"),
        (["method=adam-accum"], {"weights": 1, "gradients": 9}, "gradients", "method=sbft"),
        (["method=hf-adafactor"], {"weights": 1, "gradients": 9}, "gradients", "method=sbft"),
        (["method=adam"], {"weights": 9, "gradients": 1}, "weights", "dtype=bfloat16"),
        ([], {"weights": 9, "gradients": 1}, "weights", "weights=int8"),
        (["weights=int8"], {"weights": 9, "gradients": 1}, "weights", "smaller model"),
        (["method=lora"], {"weights": 9, "gradients": 1}, "weights", "smaller model"),
    ],
)
def test_the_advice_names_the_largest_part_and_a_switch_for_it(
    overrides: list[str], memory: dict[str, int | None], largest: str, switch: str
) -> None:
    recipe = given(*overrides)
    sizes = {name: None if size is None else size * GIB for name, size in memory.items()}
    told = training_advice(recipe, sizes, 16 * GIB, recipe.training["per_device_train_batch_size"])
    assert told.part == f"the {largest}" and f"The largest part: the {largest}" in told.text
    assert switch in told.remedy and told.remedy in told.text and f"--set {told.switch}" in told.remedy


def test_the_advice_for_an_evaluation_is_about_the_evaluation() -> None:
    before = evaluation_advice(given("evaluation.batch_size=8"), "untrained").text
    for part in ("untrained", "8 examples", "evaluation.batch_size=4", "evaluation.limit=", "evaluation.before=false"):
        assert part in before
    assert "gradient" not in before
    after = evaluation_advice(given("evaluation.batch_size=1"), "trained").text
    assert "evaluation.before" not in after and "batch_size=" not in after and "data.max_length=" in after


# A rank that waits for SIGINT as often as asked, then finishes its work and ends; SIGTERM ends it at once.
RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(99))
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print(flush=True)
while len(heard) < int(sys.argv[1]): time.sleep(0.01)
time.sleep(float(sys.argv[2]))
sys.exit(130)
"""


@pytest.mark.parametrize(("signals", "code"), [(1, 130), (2, 99)])
def test_ranks_that_stop_on_ctrl_c_are_waited_for_and_ended_on_a_second_one(signals: int, code: int) -> None:
    command = [sys.executable, "-c", RANK, "1"]
    # The first ends at once, like a rank that writes nothing; the other is still saving.
    ranks = [
        subprocess.Popen([*command, str(rest)], stdout=subprocess.PIPE) for rest in (0.0, 1.0 if signals == 1 else 60)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        rank.stdout.readline()

    def ctrl_c() -> None:
        for count in range(signals):
            time.sleep(0.3)
            if count == 0:
                for rank in ranks:
                    rank.send_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=ctrl_c)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
    presses.start()
    try:
        if signals == 1:
            assert _wait(ranks) == 130
        else:
            with pytest.raises(KeyboardInterrupt):
                _wait(ranks)
    finally:
        presses.join()
        signal.signal(signal.SIGINT, before)
        _end(ranks)
        for rank in ranks:
            assert rank.stdout is not None
            rank.stdout.close()
    assert [rank.returncode for rank in ranks] == [130, code]


def failing(error: BaseException, folder: Path, *, begun: bool, resume: bool = False) -> RunRecord:
    recipe = given()
    record = RunRecord(method="sbft", model="m", dataset="d", seed=0)
    output = RunFolder(folder, resume=resume, main=True)
    with failures_recorded(recipe, record, output):
        if begun:
            output.begin(recipe)
        raise error
    return record


def test_before_it_has_begun_a_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        failing(DataError("no data"), tmp_path / "out", begun=False)
    assert not (tmp_path / "out").exists()


def test_once_begun_its_record_says_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Ctrl-C"):
        failing(KeyboardInterrupt(), tmp_path / "out", begun=True)
    assert "Ctrl-C" in str(RunRecord.load(tmp_path / "out").error)


def test_out_of_memory_is_recorded_even_before_it_has_begun_but_never_over_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Out of memory"):
        failing(MemoryError(), tmp_path / "new", begun=False)
    assert RunRecord.load(tmp_path / "new").status == "oom"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").touch()
    with pytest.raises(TrainingError, match="Out of memory"):
        failing(MemoryError(), tmp_path / "old", begun=False, resume=True)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["precious"]


def test_a_disk_that_takes_not_even_the_record_does_not_hide_what_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "run.json.part")

    monkeypatch.setattr(RunRecord, "save", refuse)
    with pytest.raises(TrainingError, match="^Out of memory"):
        failing(MemoryError(), tmp_path / "one", begun=True)
    assert "The record of the run could not be written" in caplog.text and "mounted read-only" in caplog.text
    with pytest.raises(DiskError, match="answers.jsonl could not be written: no space is left"):
        failing(OSError(errno.ENOSPC, "No space left on device", "answers.jsonl"), tmp_path / "two", begun=True)


def test_a_folder_with_another_file_in_it_is_never_taken_for_a_failed_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: mine")  # a recipe that somebody put there by hand
    with pytest.raises(TrainingError, match="not empty"):
        check_output_folder(tmp_path, resume=False, overwrite=False)
    RunRecord(method="sbft", model="m", dataset="d", seed=0, status="error").save(tmp_path)
    check_output_folder(tmp_path, resume=False, overwrite=False)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TrainingError, match="--overwrite"):
        check_output_folder(tmp_path, resume=False, overwrite=False)
    check_output_folder(tmp_path, resume=False, overwrite=True)


def test_ctrl_c_waits_for_the_end_of_the_step_and_a_second_one_does_not(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(global_step=3, max_steps=9), TrainerControl()
    with StopBetweenSteps() as stop:
        stop.on_step_end(arguments, state, control)
        assert not control.should_save and not control.should_training_stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        stop.on_step_end(arguments, state, control)
        assert control.should_save and control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_parent_that_is_told_to_end_ends_its_ranks(tmp_path: Path) -> None:
    rank = tmp_path / "rank.sh"
    rank.write_text('#!/bin/sh\necho $$ > "$0.$RANK"\nexec sleep 100\n')
    rank.chmod(0o755)
    code = f"import sys; sys.executable = {str(rank)!r}; from sbft.cli.shared.launch import launch; sys.exit(launch([], 2))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    files = [Path(f"{rank}.{number}") for number in (0, 1)]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text().strip() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(30) == 128 + signal.SIGTERM
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_parent_that_is_told_to_end_while_it_starts_its_ranks_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = tmp_path / "rank.sh"
    rank.write_text("#!/bin/sh\nexec sleep 100\n")
    rank.chmod(0o755)
    started = []

    class Told(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)
            if len(started) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "executable", str(rank))
    monkeypatch.setattr(subprocess, "Popen", Told)
    assert launch([], 2) == 128 + signal.SIGTERM
    assert len(started) == 2 and all(process.poll() == -signal.SIGTERM for process in started)
