"""What the host knows of batches and losses: the same as the device would say."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from sbft.data.collate import Collator
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.host import CountedBatch, CountingCollator, FiniteLoss, count_tokens, is_labelled
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7], [5, 6, 0]])
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": IDS.clone()}
PARTLY = {"input_ids": IDS, "labels": torch.tensor([[5, 6, 7], [-100, 6, -100]])}


@pytest.mark.parametrize(
    ("batch", "tokens", "labelled"),
    [(PADDED, 5, True), (PARTLY, 6, False), ({"input_ids": IDS}, 6, False)],
    ids=["padded", "partly labelled", "without labels"],
)
def test_a_batch_is_counted_as_it_is_collated(batch: dict[str, Any], tokens: int, labelled: bool) -> None:
    assert (count_tokens(batch), is_labelled(batch)) == (tokens, labelled)
    counted = CountingCollator(lambda examples: batch)([])
    assert isinstance(counted, dict) and counted == batch
    for same in (counted, copy.copy(counted), pickle.loads(pickle.dumps(counted)), send_to_device(counted, "cpu")):
        assert (same.tokens, same.labelled) == (tokens, labelled)
        assert same.keys() == batch.keys() and all(torch.equal(same[name], batch[name]) for name in batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_go_with_a_batch_to_the_device() -> None:
    moved = send_to_device(pin_memory(CountingCollator(lambda examples: PADDED)([])), "cuda", non_blocking=True)
    assert moved["input_ids"].is_cuda and (moved.tokens, moved.labelled) == (5, True)
    assert torch.equal(moved["attention_mask"].cpu(), PADDED["attention_mask"])


def test_counts_are_taken_anew_of_a_batch_that_someone_rebuilt() -> None:
    rebuilt = CountedBatch({"input_ids": IDS[:, :2], "labels": torch.full((2, 2), -100)})
    assert (count_tokens(rebuilt), is_labelled(rebuilt)) == (4, False)


def test_other_batches_are_left_as_they_are() -> None:
    for batch in (UserDict(PADDED), [IDS], {"pixel_values": IDS}):
        assert CountingCollator(lambda examples, batch=batch: batch)([]) is batch  # type: ignore[misc]


def test_a_finite_loss_is_the_loss_and_answers_without_the_device() -> None:
    loss = FiniteLoss.of((torch.tensor(2.5, requires_grad=True) * 1).double())
    assert not loss.requires_grad and loss.dtype == torch.float64 and loss.device == torch.device("cpu")
    meta = FiniteLoss.of(torch.zeros((), device="meta"))  # a device that cannot be asked
    assert not (torch.isnan(meta) or torch.isinf(meta))
    total = torch.tensor(1.0)
    total += loss
    for plain in (total, loss + 1, loss.detach(), loss.clone()):
        assert type(plain) is Tensor
    assert (total.item(), float(loss), loss.item()) == (3.5, 2.5, 2.5)


class Answers(SmallBatchTrainer):
    """Notes what training steps return; the loss of the second is not finite."""

    answers: list[Tensor]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.answers.append(super().training_step(*args, **kwargs))
        return self.answers[-1]

    def _all_finite(self, loss: Tensor) -> bool:
        return super()._all_finite(loss * float("nan") if len(self.answers) == 1 else loss)


def test_only_a_loss_that_was_found_finite_says_so(tmp_path: Path) -> None:
    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=3, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 6
    trainer = Answers(model=tiny_model(), args=args, train_dataset=rows, data_collator=Collator(2))
    trainer.answers = []
    trainer.train()
    assert [type(loss) for loss in trainer.answers] == [FiniteLoss, Tensor, FiniteLoss]
    assert trainer.skipped_steps == 1
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(float(trainer.answers[0]), abs=1e-6) and len(logged) == 3


def test_batches_of_the_trainers_own_loader_are_counted_and_the_collator_stays(tmp_path: Path) -> None:
    args = SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    collator = Collator(2)
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    trainer = SmallBatchTrainer(model=tiny_model(), args=args, train_dataset=rows, data_collator=collator)
    batches = list(trainer.get_train_dataloader())
    assert [(batch.tokens, batch.labelled) for batch in batches] == [(3, False)] * 2
    assert trainer.data_collator is collator
    assert trainer.accelerator.non_blocking == args.dataloader_pin_memory
