"""`sbft train --resume` of a run that ended early: same bits, same counts, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from sbft.errors import TrainingError
from sbft.evaluation.generate import evaluate
from sbft.recipe import Recipe, load_recipe
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(24)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:18]), ("test", ROWS[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe(tiny_dir: Path, data: Path, tmp_path: Path) -> Any:
    def make(out: str, *overrides: str, **flags: str) -> Recipe:
        saving = ["training.max_steps=7", "training.save_strategy=steps", "training.save_steps=2"]
        flags = {"model": str(tiny_dir), "data": str(data / "train.jsonl"), **flags}
        return load_recipe(None, [*saving, *overrides], output_dir=str(tmp_path / out), **flags)

    return make


class Break(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise ZeroDivisionError("made on purpose")


def weights(folder: Path) -> dict[str, Any]:
    return load_file(next(iter(folder.glob("*model.safetensors"))))


def assert_same_bits(one: Path, other: Path) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["sbft", "lora"])
def test_a_resumed_run_counts_all_its_sessions(recipe: Any, tmp_path: Path, method: str) -> None:
    with pytest.raises(ZeroDivisionError):
        run(recipe("out", method=method), callbacks=[Break()])
    former = RunRecord.load(tmp_path / "out")
    former.peak_memory_bytes = 2**50
    former.save(tmp_path / "out")
    resumed, straight = run(recipe("out", method=method), resume=True), run(recipe("straight", method=method))
    assert_same_bits(tmp_path / "out", tmp_path / "straight")
    assert (resumed.steps, resumed.tokens, resumed.skipped_steps) == (7, straight.tokens, 0)
    assert resumed.peak_memory_bytes == 2**50
    # The losses before the checkpoint are lost, so there is no mean over the whole run.
    assert resumed.train_loss is None and straight.train_loss is not None
    assert resumed.tokens_per_s is not None and resumed.tokens_per_s > 0


@pytest.fixture
def replay(data: Path) -> list[str]:
    """Settings that mix older data in."""
    rows = [{"prompt": f"Name animal {n}.", "completion": "dog " * (1 + n % 3)} for n in range(12)]
    (data / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.replay.data={data / 'old.jsonl'}", "data.replay.share=0.3"]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_resumed_run_replays_the_same_examples(recipe: Any, tmp_path: Path, replay: list[str], packing: str) -> None:
    settings = [*replay, f"data.packing={packing}", "data.max_length=48"]
    with pytest.raises(ZeroDivisionError):
        run(recipe("out", *settings), callbacks=[Break()])
    resumed, straight = run(recipe("out", *settings), resume=True), run(recipe("straight", *settings))
    assert_same_bits(tmp_path / "out", tmp_path / "straight")
    assert resumed.tokens == straight.tokens and resumed.data["replay_examples"] > 0
    run(recipe("without", *settings[2:]))
    with pytest.raises(AssertionError):  # of the same steps, some were on replayed examples
        assert_same_bits(tmp_path / "out", tmp_path / "without")


@pytest.mark.long
def test_two_processes_share_what_is_replayed(
    recipe: Any, tmp_path: Path, tiny_dir: Path, data: Path, replay: list[str]
) -> None:
    """Replicated with the gradients averaged, two processes see each example of an epoch once, replayed ones included."""
    epoch = ["training.max_steps=-1", "training.num_train_epochs=1", "training.save_strategy='no'", *replay]
    alone = run(recipe("alone", *epoch))
    started = subprocess.run(
        [
            *(sys.executable, "-m", "sbft", "train", "--model", str(tiny_dir), "--data", str(data / "train.jsonl")),
            *("--output-dir", str(tmp_path / "both"), "--num-processes", "2"),
            *(part for setting in [*epoch, "optimizer.gradient_release=false"] for part in ("--set", setting)),
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    both = RunRecord.load(tmp_path / "both")
    assert both.world_size == 2 and both.data == alone.data
    # An odd number of examples is filled up with one that is seen twice.
    assert 0 <= both.tokens - alone.tokens <= alone.data["longest"]
    assert both.steps == -(-alone.steps // 2)


def test_resuming_at_the_last_step_trains_none(recipe: Any, tmp_path: Path) -> None:
    mine = recipe("out", "training.save_steps=7")
    before = run(mine)
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "model.safetensors")
    said: list[str] = []
    after = run(mine, resume=True, say=said.append)
    assert any("All steps are done" in line for line in said) and "Training" not in said
    assert_same_bits(tmp_path / "out", tmp_path)
    assert (after.status, after.steps, after.tokens) == ("ok", 7, before.tokens)
    assert after.train_loss == before.train_loss


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(recipe: Any, tmp_path: Path, damage: str) -> None:
    with pytest.raises(ZeroDivisionError):
        run(recipe("out"), callbacks=[Break()])
    out = tmp_path / "out"
    if damage == "truncated":
        os.truncate(out / "checkpoint-4" / "optimizer.pt", 100)
    elif damage == "flipped":
        file = out / "checkpoint-4" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        (out / "checkpoint-4" / "trainer_state.json").unlink()
    said: list[str] = []
    run(recipe("out"), resume=True, say=said.append)
    warnings = [line for line in said if "Warning" in line]
    assert len(warnings) == 1 and "checkpoint-4" in warnings[0] and str(out / "checkpoint-2") in warnings[0]
    run(recipe("straight"))
    assert_same_bits(out, tmp_path / "straight")


def test_another_recipe_is_not_mixed_in(recipe: Any, tmp_path: Path, data: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(recipe("out"), callbacks=[Break()])
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(TrainingError) as refused:
        run(recipe("out", method="sgd", data=str(data / "test.jsonl")), resume=True)
    said = str(refused.value)
    assert "method (there sbft, here sgd)" in said and "data.train (there" in said
    assert f"sbft train {tmp_path / 'out'}/recipe.yaml --resume" in said and "--overwrite" in said
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert run(recipe("out", "training.max_steps=6", "training.save_steps=3"), resume=True).steps == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("made on purpose")])
def test_what_goes_wrong_after_training_does_not_cost_the_model(
    recipe: Any, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls: list[int] = []

    def second_fails(*args: Any, **kwargs: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("sbft.runs.measurement.evaluate", second_fails)
    out = tmp_path / "out"
    with pytest.raises((TrainingError, ValueError)):
        run(recipe("out", eval_data=str(data / "test.jsonl")))
    record = RunRecord.load(out)
    statuses = {MemoryError: "oom", KeyboardInterrupt: "interrupted", ValueError: "error"}
    assert record.status == statuses[type(error)] and record.error is not None
    assert f"The trained model is in {out}. To measure it, type: sbft eval {out}" in record.error
    assert ("evaluation.batch_size=8" in record.error) == isinstance(error, MemoryError)
    assert "evaluation.before" not in record.error and "gradient_checkpointing" not in record.error
    assert (record.steps, record.metrics) == (7, {}) and not (out / "README.md").exists()
    monkeypatch.undo()
    run(recipe("straight"))
    assert_same_bits(out, tmp_path / "straight")
    assert (out / "tokenizer.json").exists()


def test_without_evaluation_data_nothing_is_said_to_be_measured(recipe: Any) -> None:
    said: list[str] = []
    run(recipe("out"), say=said.append)
    assert "Training" in said and not any("Measuring" in line for line in said)


@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "tell", "number", "told", "code"),
    [
        ("optimizer.gradient_release=false", os.killpg, signal.SIGINT, "Ctrl-C", 130),  # to all, as a terminal does
        ("distributed.fsdp_size=2", os.kill, signal.SIGTERM, "SIGTERM", 143),  # only to the launcher
    ],
)
def test_a_signal_stops_all_ranks_after_the_same_step(
    setting: str,
    tell: Callable[[int, int], None],
    number: signal.Signals,
    told: str,
    code: int,
    tmp_path: Path,
    tiny_dir: Path,
    data: Path,
) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "sbft", "train", "--model", str(tiny_dir), "--data", str(data / "train.jsonl")),
            *("--output-dir", str(out), "--num-processes", "2", "--set", setting),
            *("--set", "training.max_steps=2000", "--set", "training.logging_steps=2"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 4/"):
            break
    tell(running.pid, number)
    _, said = running.communicate(timeout=90)
    assert running.returncode == code and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    step = RunRecord.load(out).steps
    assert last.startswith(f"Error: Stopped by {told} after step {step} of 2000; a checkpoint is in")
    assert last.endswith("--resume --num-processes 2")
    states = {path.name for path in (out / f"checkpoint-{step}").iterdir()}
    assert {"complete.json", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= states
