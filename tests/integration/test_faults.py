"""Faults that a run survives, caused for real inside `run`: signals, memory that runs out, a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from sbft.errors import DiskError, Interrupted, RecipeError, TrainingError
from sbft.recipe import Recipe, load_recipe
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run
from sbft.training.checkpointing.checkpoints import sound_checkpoint

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(24)]
STEPS = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:18]), ("validation", ROWS[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_dir: Path, data: Path) -> Any:
    def make(out: Path, *overrides: str) -> Recipe:
        saving = [f"training.max_steps={STEPS}", "training.save_strategy=steps", "training.save_steps=2"]
        found = {"model": str(tiny_dir), "data": str(data / "train.jsonl"), "output_dir": str(out)}
        return load_recipe(None, [*saving, "training.learning_rate=1e-2", *overrides], **found)

    return make


@pytest.fixture(scope="module")
def undisturbed(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(recipe(out))
    return weights(out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


class Tell(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_signal_lets_the_step_end_and_leaves_a_checkpoint(
    recipe: Any, undisturbed: dict[str, torch.Tensor], tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted) as told:
        run(recipe(out, "training.save_strategy='no'"), callbacks=[Tell(number, 3)])
    command = f"To resume, type: sbft train {out}/recipe.yaml --resume"
    assert str(told.value) == (
        f"Stopped by {name} after step 3 of 7; a checkpoint is in {out}/checkpoint-3. {command}"
    )
    assert told.value.exit_code == code and RunRecord.load(out).error == str(told.value)
    run(recipe(out, "training.save_strategy='no'"), resume=True)
    assert_same_bits(out, undisturbed)


def test_a_signal_in_the_last_step_leaves_the_model_and_nothing_is_measured(
    recipe: Any, data: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    measured = (f"data.eval={data / 'validation.jsonl'}", "evaluation.before=false")
    with pytest.raises(Interrupted, match="SIGTERM after training, before all was measured. The trained model is in"):
        run(recipe(tmp_path / "out", *measured), callbacks=[Tell(signal.SIGTERM, STEPS)])
    assert_same_bits(tmp_path / "out", undisturbed)


class OutOfMemory(TrainerCallback):
    """Asks the real allocator for more memory than there is, at some point of step 5."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            layer = kwargs["model"].model.layers[0]
            if self.where == "backward":
                layer.register_full_backward_hook(self._allocate)
            else:
                layer.register_forward_pre_hook(self._allocate)

    def _allocate(self, layer: torch.nn.Module, *_: Any) -> None:
        if self.where != "evaluation" or not layer.training:
            torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("where", ["forward", "backward", "evaluation"])
def test_out_of_memory_names_the_switch_and_the_checkpoint_before_it_is_usable(
    recipe: Any, data: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path, where: str
) -> None:
    out = tmp_path / "out"
    evaluating = (
        "training.eval_strategy=steps",
        "training.eval_steps=5",
        f"data.validation={data / 'validation.jsonl'}",
    )
    settings = evaluating if where == "evaluation" else ()
    with pytest.raises(TrainingError) as told:
        run(recipe(out, *settings), callbacks=[OutOfMemory(where)])
    said = str(told.value)
    if where == "evaluation":
        switch = "evaluation.batch_size=8"
        assert said.startswith("Out of memory while the half-trained model was evaluated, 16 examples at a time.")
    else:
        switch = "training.gradient_checkpointing=true"
        assert said.startswith("Out of memory. The largest part: the activations")
    assert f"add --set {switch}" in said and said.endswith(
        f"The last checkpoint, {out}/checkpoint-4, is intact. To resume from it with that, type: sbft train "
        f"{out}/recipe.yaml --resume --set {switch}"
    )
    assert RunRecord.load(out).status == "oom"
    run(recipe(out, *settings, switch), resume=True)
    assert_same_bits(out, undisturbed)


class SmallFiles(TrainerCallback):
    """From the fourth step on, no file can grow above 100 kB, less than the model needs."""

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.before[1]))


def test_a_disk_that_takes_no_more_is_said_and_the_run_goes_on_when_there_is_room(
    recipe: Any, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    try:
        with pytest.raises(DiskError) as told:
            run(recipe(out), callbacks=[SmallFiles()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, SmallFiles.before)
    said = str(told.value)
    assert said.startswith(f"The checkpoint of step 4 could not be written to {out}: ") and " are free there" in said
    assert said.endswith(
        f"The last checkpoint, {out}/checkpoint-2, is intact. To resume from it, type: sbft train {out}/recipe.yaml --resume"
    )
    assert RunRecord.load(out).error == said and sound_checkpoint(out) == (out / "checkpoint-2", {})
    run(recipe(out), resume=True)
    assert_same_bits(out, undisturbed)


def test_the_best_model_by_validation_loss_is_the_one_that_is_kept(recipe: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said: list[str] = []
    record = run(
        # The rate is far too high, so that the last step is not the best.
        recipe(
            out, f"data.validation={data / 'validation.jsonl'}", "training.learning_rate=3.0", "evaluation.before=false",
            "training.eval_strategy=steps", "training.eval_steps=1", "training.save_strategy=best",
            "training.load_best_model_at_end=true", "training.save_total_limit=1",
        ),
        say=said.append,
    )  # fmt: skip
    losses = {entry["step"]: entry["eval_loss"] for entry in record.history}
    assert list(losses) == list(range(1, STEPS + 1))
    best = int(min(losses, key=lambda step: losses[step]))
    assert (
        best < STEPS
        and f"The model of checkpoint-{best} is kept: its loss on the validation data was the lowest" in said
    )
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert_same_bits(out, weights(out / f"checkpoint-{best}"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluation.limit=3", "data.validation_size"),
        ("training.metric_for_best_model=exact_match", "the loss"),
        ("training.load_best_model_at_end=true", "eval_steps is 1 and training.save_steps 2.*same number"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(
    recipe: Any, data: Path, tmp_path: Path, override: str, named: str
) -> None:
    held_out = [f"data.validation={data / 'validation.jsonl'}"] if override.startswith("training") else []
    with pytest.raises(RecipeError, match=named):
        run(recipe(tmp_path / "out", "training.eval_strategy=steps", "training.eval_steps=1", override, *held_out))
    assert not (tmp_path / "out").exists()
