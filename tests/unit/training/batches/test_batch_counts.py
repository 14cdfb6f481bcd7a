"""What the host knows about batches and losses: the same as the device would report."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from sbft.data.collate import Collator
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.batches.batch_counts import CountedBatch, CountingCollator, Counts, counts_of
from sbft.training.trainer import SmallBatchTrainer
from sbft.training.training_step import FiniteLoss
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7], [5, 6, 0]])
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": IDS.clone()}
PARTLY = {"input_ids": IDS, "labels": torch.tensor([[5, 6, 7], [-100, 6, -100]])}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (PADDED, Counts(5, True, False)),
        ({**PADDED, "labels": IDS.where(IDS > 0, -100)}, Counts(5, False, True)),
        ({**PADDED, "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, Counts(5, True, False)),
        ({**PADDED, "attention_mask": torch.ones(2, 1, 3, 3)}, Counts(6, True, False)),
        (PARTLY, Counts(6, False, True)),
        ({"input_ids": IDS}, Counts(6, False, True)),
    ],
    ids=["labels on padding", "padded", "padded on the left", "mask of one's own", "partly labelled", "without labels"],
)
def test_a_batch_is_counted_as_it_is_collated(batch: dict[str, Any], expected: Counts) -> None:
    assert Counts.of(batch) == expected
    counted = CountingCollator(lambda examples: batch)([])
    assert isinstance(counted, dict) and counted == batch
    for same in (counted, copy.copy(counted), pickle.loads(pickle.dumps(counted)), send_to_device(counted, "cpu")):
        assert same.counts == expected
        assert same.keys() == batch.keys() and all(torch.equal(same[name], batch[name]) for name in batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counts_go_with_a_batch_to_the_device() -> None:
    moved = send_to_device(pin_memory(CountedBatch.of(PADDED)), "cuda", non_blocking=True)
    assert moved["input_ids"].is_cuda and moved.counts == Counts(5, True, False)
    assert torch.equal(moved["attention_mask"].cpu(), PADDED["attention_mask"])


def cut(batch: Any) -> None:
    for name in batch:
        batch[name] = batch[name][:, :2]


def mask_in_place(batch: Any) -> None:
    batch["labels"][0, 0] = -100


def mask_anew(batch: Any) -> None:
    batch["labels"] = batch["labels"].masked_fill(IDS == 5, -100)


def unlabel(batch: Any) -> None:
    del batch["labels"]


CHANGES = {
    cut: Counts(4, True, True),
    mask_in_place: Counts(5, False, False),
    mask_anew: Counts(5, False, False),
    unlabel: Counts(5, False, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_that_someone_changes_is_counted_anew(change: Callable[[Any], None]) -> None:
    batch = CountedBatch.of({name: one.clone() for name, one in PADDED.items()}).to("cpu")
    assert batch.counts == Counts(5, True, False)
    change(batch)
    assert batch.counts is None and counts_of(batch) == CHANGES[change]


def test_counts_are_those_of_a_batch_made_of_the_same_tensors_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = CountedBatch.of(PARTLY).to("cpu")
    rebuilt = CountedBatch({**counted})
    more = {**counted, "position_ids": IDS}
    assert rebuilt.counts is None
    anew = Counts(-1, True, True)
    monkeypatch.setattr(Counts, "of", lambda batch: anew)
    assert counts_of(rebuilt, counted) == Counts(6, False, True)
    assert counts_of(rebuilt) is counts_of(more, counted) is anew


def test_other_batches_are_left_as_they_are() -> None:
    for batch in (UserDict(PADDED), [IDS], {"pixel_values": IDS}):
        assert CountingCollator(lambda examples, batch=batch: batch)([]) is batch  # type: ignore[misc]


def test_a_finite_loss_is_the_loss_and_answers_without_the_device() -> None:
    loss = FiniteLoss.of((torch.tensor(2.5, requires_grad=True) * 1).double())
    assert not loss.requires_grad and loss.dtype == torch.float64 and loss.device == torch.device("cpu")
    meta = FiniteLoss.of(torch.zeros((), device="meta"))  # a device whose values cannot be read
    assert not (torch.isnan(meta) or torch.isinf(meta))
    total = torch.tensor(1.0)
    total += loss
    for plain in (total, loss + 1, loss.detach(), loss.clone()):
        assert type(plain) is Tensor
    assert (total.item(), float(loss), loss.item()) == (3.5, 2.5, 2.5)


# In the trainer


def trained(folder: Path, kind: type[SmallBatchTrainer], **settings: Any) -> Any:
    args = SmallBatchTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=4, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
    trainer = kind(model=tiny_model(), args=args, train_dataset=rows, data_collator=Collator(2))
    trainer.train()
    return trainer


def logged(trainer: SmallBatchTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class SecondIsNotFinite(SmallBatchTrainer):
    """Finds the loss of the second step not to be finite."""

    def _all_finite(self, loss: Tensor) -> bool:
        bad = self.state.global_step == 1 and not self.skipped_steps
        return super()._all_finite(loss * float("nan") if bad else loss)


def test_only_a_loss_that_was_found_finite_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    of = FiniteLoss.of
    monkeypatch.setattr(FiniteLoss, "of", lambda loss: (told.append(loss), of(loss))[1])
    trainer = trained(tmp_path, SecondIsNotFinite)
    assert trainer.skipped_steps == 1 and len(told) == 3
    assert len(logged(trainer)) == 4 and logged(trainer)[0] == pytest.approx(float(told[0]), abs=1e-6)


class WithAnotherTerm(SmallBatchTrainer):
    """Adds a term to the loss that is NaN in the second step, after the check."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + (float("nan") if self.state.global_step == 1 else 0.0)


class Prints(SmallBatchTrainer):
    """Uses the loss as code around a training step does."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        assert type(loss) is Tensor
        return copy.deepcopy(loss)


def test_losses_of_a_trainer_of_ones_own_are_plain_tensors(tmp_path: Path) -> None:
    losses = logged(trained(tmp_path, WithAnotherTerm))
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    trained(tmp_path, Prints)


class CutsBatches(SmallBatchTrainer):
    """Changes batches after the collator, which is still sbft's own."""

    def get_train_dataloader(self) -> Any:
        assert isinstance(self.data_collator, Collator)
        for batch in super().get_train_dataloader():
            cut(batch)
            yield batch


def test_tokens_are_those_of_the_batch_that_is_trained_on(tmp_path: Path) -> None:
    args = SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
    trainers = [
        kind(model=tiny_model(), args=args, train_dataset=rows, data_collator=Collator(2, 1))
        for kind in (SmallBatchTrainer, CutsBatches)
    ]
    batches = [list(trainer.get_train_dataloader()) for trainer in trainers]
    assert [[batch.counts for batch in some] for some in batches] == [[Counts(3, False, True)] * 2, [None] * 2]
    trainers[1].get_batch_samples(iter(batches[1]), 2, args.device)
    assert trainers[1]._step_tokens == 4
    assert not trainers[0].accelerator.non_blocking  # only where this is known to be safe: CUDA, from pinned memory
