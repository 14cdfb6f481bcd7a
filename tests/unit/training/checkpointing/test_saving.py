"""What a trainer leaves on the disk: complete checkpoints, the best among them, and the last good one on a full disk."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from sbft.data.collate import Collator
from sbft.errors import DiskError, TrainingError
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.checkpointing import saving
from sbft.training.checkpointing.checkpoints import damage
from sbft.training.checkpointing.disk_errors import writing
from sbft.training.checkpointing.saving import saved_whole
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model
from tests.unit.training.test_trainer import assert_same, rows, weights


def saving_trainer(folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> SmallBatchTrainer:
    held_out = arguments.pop("eval_dataset", None)
    defaults: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "report_to": []}
    args = SmallBatchTrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**defaults, **arguments})
    return SmallBatchTrainer(
        tiny_model(), args, Collator(2), train_dataset=rows(), eval_dataset=held_out, callbacks=[*callbacks]
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_bears_its_name_only_once_it_is_whole_and_only_then_is_the_one_before_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def sealed(checkpoint: Path, *noted: Any) -> None:
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= names(checkpoint)
        seen.append(names(tmp_path))
        before(checkpoint, *noted)

    before = saving.seal
    monkeypatch.setattr(saving, "seal", sealed)
    saving_trainer(tmp_path, save_total_limit=1).train()
    assert seen == [{"incomplete"}, *({"incomplete", "latest", f"checkpoint-{step}"} for step in (2, 4))]
    assert (
        names(tmp_path) == {"checkpoint-6", "latest"} and (tmp_path / "latest").resolve() == tmp_path / "checkpoint-6"
    )
    assert damage(tmp_path / "checkpoint-6") is None


def test_resuming_passes_over_a_flipped_byte_and_ends_in_the_same_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = saving_trainer(tmp_path)
    straight.train()
    for name in ("checkpoint-4/optimizer.pt", "checkpoint-6/model.safetensors"):
        flip(tmp_path / name)
    resumed = saving_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.model, weights(straight.model))
    said = next(record.getMessage() for record in caplog.records if "skipped" in record.getMessage())
    for part in ("checkpoint-6: model.safetensors", "checkpoint-4: optimizer.pt", f"from {tmp_path / 'checkpoint-2'}"):
        assert part in said
    # Damaged checkpoints are written again.
    assert all(damage(tmp_path / f"checkpoint-{step}") is None for step in (2, 4, 6))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_is_kept_and_becomes_the_model_and_the_newest_stays_to_resume_from(tmp_path: Path, limit: int) -> None:
    def losses(*values: float) -> SmallBatchTrainer:
        trainer = saving_trainer(
            tmp_path, save_total_limit=limit, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            eval_dataset=rows((5, 9)),
        )  # fmt: skip
        remaining = iter(values)

        def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            trainer.control.should_evaluate = False
            return {"eval_loss": next(remaining)}

        trainer._evaluate = evaluate  # type: ignore[method-assign]
        return trainer

    trainer = losses(3.0, 1.0, 2.0)
    trainer.train()
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6", "latest"}
    assert (tmp_path / "latest").resolve().name == "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert_same(trainer.model, load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    # The checkpoint names itself as the best, although it had another name when this was written.
    resumed = losses(3.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(resumed.model, weights(trainer.model))
    flip(tmp_path / "checkpoint-4" / "model.safetensors")
    with pytest.raises(TrainingError, match="checkpoint-4.*model.safetensors"):
        losses(3.0, 3.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


class SmallFiles(TrainerCallback):
    """After a step, no file of this process can grow above some bytes: writes fail half-way, as on a full disk."""

    def __init__(self, step: int, file_bytes: int) -> None:
        self.step, self.file_bytes = step, file_bytes
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


# In one case the model is cut off, in the other the optimizer's state, which torch writes.
@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_a_write_that_is_cut_off_is_said_and_leaves_the_checkpoint_before_it(tmp_path: Path, part: str) -> None:
    straight = saving_trainer(tmp_path / "straight")
    straight.train()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "straight" / "checkpoint-2").iterdir()}
    # AdamW's state is larger than the model, Adafactor's smaller.
    kind = "adafactor" if part == "model.safetensors" else "adamw"
    limit = SmallFiles(3, sizes["model.safetensors"] + (-1000 if kind == "adafactor" else 1000))
    folder = tmp_path / "out"
    trainer = saving_trainer(folder, limit, token_optimizer=kind)
    try:
        with pytest.raises(DiskError) as told:
            trainer.train()
    finally:
        limit.lift()
    said = str(told.value)
    assert said.startswith(f"The checkpoint of step 4 could not be written to {folder}: ")
    assert " are free there, and " in said and said.endswith(" are needed.")
    assert names(folder) == {"checkpoint-2", "latest"} and damage(folder / "checkpoint-2") is None
    if kind == "adafactor":
        resumed = saving_trainer(folder)
        resumed.train(resume_from_checkpoint=True)
        assert_same(resumed.model, weights(straight.model))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left there"),
        (OSError(errno.EROFS, "Read-only file system"), "it is mounted read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "writing failed"),
    ],
)
def test_what_the_disk_refuses_is_said_in_a_sentence(tmp_path: Path, error: Exception, reason: str) -> None:
    said = rf"It could not be written to {tmp_path}: {reason}.*\d+\.\d .iB are free there"
    with pytest.raises(DiskError, match=said), writing("It", tmp_path):
        raise error
    for other in (
        ValueError("no space is left there"),
        RuntimeError("CUDA error"),
        FileNotFoundError(errno.ENOENT, "x"),
    ):
        with pytest.raises(type(other)), writing("It", tmp_path):
            raise other


def test_a_model_replaces_the_one_before_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"before")
    with pytest.raises(DiskError, match="The trained model could not be written"), saved_whole(tmp_path) as part:
        (part / "model.safetensors").write_bytes(b"af")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == {"model.safetensors"} and (tmp_path / "model.safetensors").read_bytes() == b"before"
    with saved_whole(tmp_path) as part:
        (part / "model.safetensors").write_bytes(b"after")
        (part / "templates").mkdir()
    assert names(tmp_path) == {"model.safetensors", "templates"}
    assert (tmp_path / "model.safetensors").read_bytes() == b"after"
