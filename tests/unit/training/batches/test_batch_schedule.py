"""A batch that doubles: its sizes, its content, the learning rate, and a run that is interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from sbft.data.collate import Collator
from sbft.errors import RecipeError
from sbft.recipe import load_recipe
from sbft.runs.build import training_arguments
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.batches.batch_schedule import BatchSchedule, ScheduledBatches, rates_by_examples
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

SIZES = [1, 1, 1, 1, 2, 2, 4, 8, 8]  # from 1, doubling every 4 examples, at most 8
SCHEDULE = BatchSchedule(1, 4, 8)


def arguments(folder: Path, **settings: Any) -> SmallBatchTrainingArguments:
    usual: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return SmallBatchTrainingArguments(output_dir=str(folder), logging_steps=1, **{**usual, **settings})


def test_the_batch_doubles_with_the_examples_seen() -> None:
    seen = SCHEDULE.seen(len(SIZES))
    assert [after - before for before, after in zip(seen, seen[1:], strict=False)] == SIZES
    assert [SCHEDULE.steps(examples) for examples in (0, 1, 4, 5, 12, 13, 28)] == [0, 1, 4, 5, 7, 8, 9]
    assert BatchSchedule(3, 1, 100).size(10**12) == 100
    assert BatchSchedule(5, 7, 5).seen(3) == [0, 5, 10, 15]


def test_every_pass_over_the_data_has_each_example_once() -> None:
    batches = ScheduledBatches(14, SCHEDULE, len(SIZES), seed=3)
    found = list(batches)
    assert [len(batch) for batch in found] == SIZES and len(batches) == len(SIZES)
    indices = [index for batch in found for index in batch]
    assert sorted(indices[:14]) == sorted(indices[14:28]) == list(range(14))
    assert indices[:14] != indices[14:28] != list(range(14))
    assert list(batches) == found != list(ScheduledBatches(14, SCHEDULE, len(SIZES), seed=5))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_the_learning_rate_goes_by_examples(tmp_path: Path, kind: str, warmup: float) -> None:
    settings = arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=warmup)
    rates: dict[str, list[float]] = {}
    for name, first, largest, steps in (("one", 1, 1, 28), ("four", 4, 4, 8), ("doubling", 1, 8, len(SIZES))):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        rates[name] = rates_of(
            optimizer, rates_by_examples(optimizer, settings, BatchSchedule(first, 4, largest), steps)
        )
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    usual = get_scheduler(kind, plain, settings.get_warmup_steps(8), 8)
    # A batch that does not grow has the usual schedule; one that grows has that of single examples.
    assert rates["four"][:8] == pytest.approx(rates_of(plain, usual)[:8])
    seen = SCHEDULE.seen(len(SIZES))
    assert rates["doubling"][: len(SIZES)] == [rates["one"][examples] for examples in seen[:-1]]


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("polynomial", {"lr_end": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 0.2}),
        ("cosine_warmup_with_min_lr", {"min_lr": 0.2}),
    ],
)
def test_a_schedule_that_ends_at_a_given_rate_ends_there(tmp_path: Path, kind: str, chosen: dict[str, float]) -> None:
    settings = arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=2, lr_scheduler_kwargs=chosen)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0) for _ in range(2))
    found = rates_of(ours, rates_by_examples(ours, settings, BatchSchedule(1, 4, 1), 12))
    usual = rates_of(theirs, get_scheduler(kind, theirs, 2, 12, scheduler_specific_kwargs=chosen))
    assert found[:13] == pytest.approx(usual[:13])


def rates_of(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> list[float]:
    rates = []
    for _ in range(28):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_schedule_that_looks_at_the_loss_is_refused(tmp_path: Path) -> None:
    settings = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(RecipeError, match="reduce_lr_on_plateau.*cosine"):
        rates_by_examples(optimizer, settings, SCHEDULE, 5)


class Listen(TrainerCallback):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.tokens.append(optimizer.optimizer.tokens_per_step)
        self.rates.append(optimizer.param_groups[0]["lr"])


def trainer(folder: Path, heard: Listen, **settings: Any) -> SmallBatchTrainer:
    rows = [[3 + (i + j) % 400 for j in range(8)] for i in range(14)]
    grows = {"batch_doubling_examples": 4, "largest_batch_size": 8, "lr_scheduler_type": "linear"}
    return SmallBatchTrainer(
        model=tiny_model(layers=1),
        args=arguments(folder, **{**grows, **settings}),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=Collator(2),
        callbacks=[heard],
    )


def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, first, second = Listen(), Listen(), Listen()
    one = trainer(tmp_path / "whole", whole, num_train_epochs=2)
    one.train()
    assert whole.tokens == [8 * size for size in SIZES] and one.state.global_step == len(SIZES)
    assert one.tokens_seen == 8 * 28
    assert whole.rates == pytest.approx([1e-4 * (28 - seen) / 28 for seen in SCHEDULE.seen(len(SIZES))[:-1]])

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == 6

    cut = trainer(tmp_path / "cut", first, num_train_epochs=2, save_strategy="steps", save_steps=100)
    cut.add_callback(Stop())
    cut.train()
    again = trainer(tmp_path / "cut", second, num_train_epochs=2, save_strategy="steps", save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert first.tokens + second.tokens == whole.tokens and first.rates + second.rates == whole.rates
    assert again.tokens_seen == one.tokens_seen
    for (name, a), b in zip(one.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_doubling_examples": 4}, "largest_batch_size.*Set both"),
        ({"largest_batch_size": 4}, "batch_doubling_examples.*Set both"),
        ({"batch_doubling_examples": 0, "largest_batch_size": 4}, "batch_doubling_examples is 0"),
        ({"batch_doubling_examples": 4, "largest_batch_size": 4, "per_device_train_batch_size": 8}, "4, less than.*8"),
        (
            {"batch_doubling_examples": 4, "largest_batch_size": 8, "gradient_accumulation_steps": 2,
             "gradient_release": False},
            "gradient_accumulation_steps is 2",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        arguments(tmp_path, **settings)


def test_a_recipe_says_it_in_a_section(tmp_path: Path) -> None:
    said = ["batch_schedule={doubling_examples: 100, largest: 16}", "training.per_device_train_batch_size=2"]
    recipe = load_recipe(None, said, model="m", data="d.jsonl")
    assert training_arguments(recipe, tmp_path).batch_schedule == BatchSchedule(2, 100, 16)
    with pytest.raises(RecipeError, match="batch_schedule.largest is missing"):
        load_recipe(None, ["batch_schedule={doubling_examples: 100}"], model="m", data="d.jsonl")
    with pytest.raises(RecipeError, match="batch_schedule.largest is 16, less than the first batch.*32"):
        load_recipe(None, [said[0], "training.per_device_train_batch_size=32"], model="m", data="d.jsonl")
    with pytest.raises(RecipeError, match="batch_schedule makes the batch larger itself"):
        load_recipe(None, [said[0], "method=adam-accum"], model="m", data="d.jsonl")
