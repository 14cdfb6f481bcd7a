"""The watch warns of what it should, once and with the cause, is silent about noise, and changes nothing."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from sbft.data.collate import Collator
from sbft.grid.codes import elements
from sbft.grid.convert import put_on_grids
from sbft.grid.weight import GridWeight
from sbft.optim import Adafactor, AdamW
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from sbft.training.watch.loss_jump import Jump, LossWatch, message_of_jump
from sbft.training.watch.movement import MovementWatch, is_stall, message_of_stall
from sbft.training.watch.training_watch import TrainingWatch
from tests.tiny import tiny_model

TOKENS = 50


def first_jump(losses: Any, guess: float | None = None, tokens: int = TOKENS) -> tuple[int, Jump] | None:
    """The step at which a jump is found, and the jump, looking every 8 steps as in training."""
    watch = LossWatch(guess)
    for step, loss in enumerate(losses, start=1):
        watch.add(step, float(loss), tokens)
        if step % 8 == 0 and (jump := watch.jump()) is not None:
            return step, jump
    return None


def short_answers(random: np.random.Generator, steps: int, large: float) -> np.ndarray:
    """Losses of a model late in fine-tuning at batch size 1: it knows most answers well, and a share of them not at all."""
    known = 0.02 * np.exp(random.normal(0, 1, steps))
    return np.where(random.random(steps) < large, np.abs(random.normal(3, 1, steps)), known)


@pytest.mark.parametrize("large", [0.05, 0.2, 0.5])
def test_noise_of_short_answers_is_no_jump(large: float) -> None:
    random = np.random.default_rng(1)
    for _ in range(10):
        assert first_jump(short_answers(random, 600, large)) is None


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5])
def test_heavy_tails_are_no_jump_nor_is_a_quick_fall(width: float) -> None:
    random = np.random.default_rng(2)
    fall = 0.3 + 2 * np.exp(-np.arange(600) / 20)
    for _ in range(5):
        noise = np.exp(random.normal(0, width, 600))
        assert first_jump(noise) is None
        assert first_jump(noise * fall, guess=math.log(49152)) is None


def test_single_examples_however_bad_are_no_jump() -> None:
    random = np.random.default_rng(3)
    losses = np.exp(random.normal(0, 0.4, 500))
    losses[::25] = 14.0
    assert first_jump(losses) is None


def test_a_loss_that_rises_and_stays_is_found_where_it_began() -> None:
    random = np.random.default_rng(4)
    for rise_at in (60, 200, 400):
        losses = np.exp(random.normal(0, 0.5, 500))
        losses[rise_at:] += 6.0
        found = first_jump(losses)
        assert found is not None
        step, jump = found
        assert rise_at < step <= rise_at + 24 and jump.step == rise_at + 1
        assert jump.loss == pytest.approx(7, abs=1)


def test_the_z_score_is_that_of_the_definition() -> None:
    usual = [1.0 + 0.01 * ((7 * i) % 40) for i in range(32)]
    found = first_jump([*usual, *[1.0] * 4, *[9.0] * 12])
    assert found is not None and found[0] == 48 and found[1].step == 37 and found[1].loss == 9.0
    middle = statistics.median(usual)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in usual)
    upper = (statistics.quantiles(usual, n=20, method="inclusive")[-1] - middle) / 1.645
    expected = (
        f"{middle:.2f} was usual in the 32 steps before, robust z-score {(9.0 - middle) / max(deviation, upper):.1f}"
    )
    assert found[1].compared_with == expected


def test_steps_of_few_tokens_are_judged_by_more_of_them() -> None:
    calm, rise = [1.0, 1.2, 0.8, 1.1] * 20, [9.0] * 64
    few, many = first_jump(calm + rise, tokens=5), first_jump(calm + rise, tokens=50)
    assert few is not None and many is not None and few[0] > many[0] + 16 and few[1].step == many[1].step == 81


def test_a_model_driven_to_guessing_at_once_is_found_and_one_that_begins_there_is_not() -> None:
    random = np.random.default_rng(5)
    lost = np.concatenate([[5.5, 5.0], random.normal(9.5, 1, 14)])
    found = first_jump(lost, guess=math.log(49152))
    assert found is not None and found[0] == 16 and "began at 5.00" in found[1].compared_with
    assert first_jump(random.normal(10.9, 0.3, 200), guess=math.log(49152)) is None


def test_sampling_counts_exactly_the_changed_larger_half_and_leaves_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    state = torch.get_rng_state()
    watch = MovementWatch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert watch.elements == 2 * 512
    larger = [p.abs() >= p.abs().flatten().sort().values[512] for p in (model[0].weight, model[1].weight)]
    watch.before_step()
    with torch.no_grad():
        model[0].weight[larger[0]] += 1.0
        model[1].weight[~larger[1]] += 1.0  # the smaller half does not count
        model[1].weight[3][larger[1][3]] *= -1.0
    changed = watch.after_step()
    assert changed is not None and int(changed) == 512 + int(larger[1][3].sum())
    assert watch.after_step() is None


def test_what_is_sampled_is_trainable_and_no_embedding() -> None:
    model = tiny_model(tied=False, layers=3)
    mlp = model.model.layers[0].mlp.up_proj.weight
    mlp.requires_grad_(False)
    watch = MovementWatch(model)
    watch.before_step()
    with torch.no_grad():
        for parameter in (mlp, model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            parameter += 1.0
    assert int(watch.after_step() or 0) == 0
    assert watch.bfloat16 and watch.elements > 0
    embeddings = nn.Embedding(300, 8)
    assert MovementWatch(embeddings).elements == 512  # the model has nothing else
    frozen = MovementWatch(model.requires_grad_(False))
    frozen.before_step()
    assert frozen.elements == 0 and frozen.after_step() is None


def test_sampling_takes_views_and_transposed_weights_as_they_are() -> None:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.randn(4, 6).t())
    watch = MovementWatch(layer)
    largest = int(layer.weight.detach().abs().reshape(-1).argmax())
    watch.before_step()
    with torch.no_grad():
        layer.weight[largest // 4, largest % 4] = 0.0
    assert int(watch.after_step() or 0) == 1


@pytest.mark.parametrize("name", ["int4", "int8", "int12"])
def test_sampling_compares_values_on_a_grid(name: str) -> None:
    layer = nn.Linear(64, 128, bias=False).to(torch.bfloat16)
    put_on_grids(layer, name)
    weight = layer.weight
    assert isinstance(weight, GridWeight)
    positions = torch.randperm(weight.numel())[:100]
    assert torch.equal(elements(weight.quantized, positions), weight.dequantize(torch.float32).view(-1)[positions])
    watch = MovementWatch(layer)
    assert watch.on_grid and watch.elements == 512
    watch.before_step()
    assert int(watch.after_step() or 0) == 0
    watch.before_step()
    weight.scales.mul_(2)  # the codes do not change
    assert int(watch.after_step() or 0) == 512


# In training


def rows(length: int = 40, count: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 512, (length,), generator=generator).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make(tmp_path: Path, model: PreTrainedModel | None = None, **arguments: Any) -> SmallBatchTrainer:
    callbacks = arguments.pop("callbacks", None)
    defaults: dict[str, Any] = {"max_steps": 32, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{**defaults, **arguments})
    model = tiny_model(hidden=128) if model is None else model
    return SmallBatchTrainer(
        model=model, args=args, train_dataset=rows(), data_collator=Collator(2), callbacks=callbacks
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "sbft.training.watch.training_watch"]


@pytest.mark.parametrize("release", [True, False])
def test_nearest_rounding_at_a_small_rate_gives_one_warning_with_the_line_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, release: bool
) -> None:
    settings: dict[str, Any] = {"learning_rate": 3e-5, "gradient_release": release}
    make(tmp_path, **settings).train()
    assert warnings_of(caplog) == []  # with stochastic rounding
    make(tmp_path, **settings, stochastic_rounding=False).train()
    (warning,) = warnings_of(caplog)
    assert "a step changes 0.00%" in warning and "optimizer: {stochastic_rounding: true}" in warning
    assert "learning_rate 3e-05" in warning


def test_a_rate_too_small_for_float32_is_the_cause_that_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(dtype=torch.float32)
    make(
        tmp_path, model, learning_rate=1e-12, cast_weights=False, gradient_accumulation_steps=2, gradient_release=False
    ).train()
    (warning,) = warnings_of(caplog)
    assert "learning_rate 1e-12 is too small" in warning


def test_an_optimizer_of_torch_that_rounds_to_nearest_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, token_optimizer=None, optim="adamw_torch", learning_rate=1e-7, gradient_release=False).train()
    (warning,) = warnings_of(caplog)
    assert "AdamW rounds to nearest" in warning and "dtype: float32" in warning


def test_a_zero_rate_a_warm_up_and_a_decay_to_zero_are_no_stall(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, learning_rate=0.0).train()
    make(tmp_path, learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=31).train()
    make(tmp_path, learning_rate=1e-4, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 30.0}).train()
    assert warnings_of(caplog) == []


def test_skipped_steps_are_no_stall(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class MostlyNotFinite(SmallBatchTrainer):
        def _all_finite(self, loss: torch.Tensor) -> bool:
            return self.state.global_step % 3 == 2 and super()._all_finite(loss)

    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=100, report_to=[], save_strategy="no", learning_rate=1e-3
    )
    trainer = MostlyNotFinite(model=tiny_model(), args=args, train_dataset=rows(8), data_collator=Collator(2))
    trainer.train()
    assert trainer.skipped_steps == 67 and warnings_of(caplog) == []


def test_weights_that_get_no_gradient_are_said_to_have_none() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = AdamW([weight], lr=1e-3)
    weight.grad = torch.zeros_like(weight)
    optimizer.tokens_per_step = 4
    optimizer.step()
    assert is_stall(0.0, optimizer, bfloat16=False)
    assert "gradient is zero" in message_of_stall(0.0, 32, optimizer, 1e-3, bfloat16=False)


def test_weights_that_stop_once_the_loss_has_fallen_are_no_stall(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, stochastic_rounding=False, max_steps=1)
    trainer.train()
    fallen, same = [4.0] * 8 + [0.5] * 100, [4.0] * 108
    _drive(trainer, fallen, moves=40)
    assert warnings_of(caplog) == []
    for count, (losses, moves) in enumerate([(same, 40), (fallen, 0), (same, 0)], start=1):
        _drive(trainer, losses, moves)
        assert len(warnings_of(caplog)) == count


def _drive(trainer: SmallBatchTrainer, losses: list[float], moves: int) -> None:
    """Let a new watch see steps with these losses; the first `moves` of them change every weight."""
    watch = TrainingWatch()
    given: Any = {"optimizer": trainer.optimizer, "model": trainer.model}
    trainer.state.log_history = []
    watch.on_train_begin(trainer.args, trainer.state, trainer.control, **given)
    for step, loss in enumerate(losses, start=1):
        trainer.state.global_step = step
        watch.on_step_begin(trainer.args, trainer.state, trainer.control, **given)
        watch.add_loss(torch.tensor(loss), TOKENS)
        if step <= moves:
            for parameter in trainer.model.parameters():
                parameter.data.neg_()
        watch.on_step_end(trainer.args, trainer.state, trainer.control, **given)
    watch.on_train_end(trainer.args, trainer.state, trainer.control, **given)


def test_losses_are_read_together_and_the_parts_of_a_step_add_up(tmp_path: Path) -> None:
    watch = TrainingWatch()
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    reads: list[int] = []

    given: Any = {"optimizer": trainer.optimizer, "model": trainer.model}
    watch.on_train_begin(trainer.args, trainer.state, trainer.control, **given)
    for step in range(1, 17):
        trainer.state.global_step = step
        watch.on_step_begin(trainer.args, trainer.state, trainer.control, **given)
        for part in (0.25, 0.5):
            watch.add_loss(torch.tensor(part + step), TOKENS)
        watch.on_step_end(trainer.args, trainer.state, trainer.control, **given)
        reads.append(len(watch._losses._steps))
    assert reads == [0] * 7 + [8] * 8 + [16]
    assert [loss for _, loss, _ in watch._losses._steps] == [0.75 + 2 * step for step in range(1, 17)]


def test_a_rate_that_becomes_far_too_high_gives_one_warning_of_the_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Raise(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if state.global_step >= 40:
                optimizer.param_groups[0]["lr"] = 1.0

    make(tmp_path, learning_rate=1e-3, max_steps=64, callbacks=[Raise()]).train()
    (warning,) = warnings_of(caplog)
    assert "loss has jumped: from step 4" in warning and "learning rate is too high" in warning
    assert "lower learning_rate, which is 0.001, to 0.0003" in warning


def test_a_beta2_made_for_large_batches_is_the_cause_that_is_named() -> None:
    jump = Jump(70, 8.0, "1.00 was usual")
    weight = nn.Parameter(torch.ones(2, 2))
    ours = message_of_jump(jump, Adafactor([weight], beta2=0.95), 1e-3, tokens_per_step=100)
    assert "beta2 0.95 at 100 tokens" in ours and "within 1351 tokens" in ours
    assert "optimizer: {second_moment_half_life: 221" in ours
    torchs = message_of_jump(jump, torch.optim.AdamW([weight], betas=(0.9, 0.95)), 1e-3, tokens_per_step=100)
    assert "Set adam_beta2 to 0.99969" in torchs
    for fine in (
        Adafactor([weight]),
        Adafactor([weight], beta2=0.8, schedule="power"),
        AdamW([weight], beta2=0.9999),
        torch.optim.SGD([weight], lr=1e-3),
    ):
        assert "learning rate is too high" in message_of_jump(jump, fine, 1e-3, tokens_per_step=100)


def test_the_watch_changes_neither_weights_nor_random_state(tmp_path: Path) -> None:
    ends = []
    for watched in (True, False):
        trainer = make(tmp_path, tiny_model("gpt2", hidden=128), learning_rate=1e-2, max_steps=20)  # with dropout
        if not watched:
            trainer.remove_callback(TrainingWatch)
        trainer.train()
        ends.append(([p.detach().clone() for p in trainer.model.parameters()], torch.get_rng_state()))
    (weights, state), (plain_weights, plain_state) = ends
    assert all(torch.equal(p, q) for p, q in zip(weights, plain_weights, strict=True))
    assert torch.equal(state, plain_state)
