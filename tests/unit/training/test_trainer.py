"""The trainer uses its parts as intended: what it tells the optimizer, what it skips, refuses and leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from sbft.data.collate import Collator
from sbft.errors import ModelError, SbftError, TrainingError
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

LENGTHS = (5, 9, 7, 12, 6, 8)


def rows(lengths: tuple[int, ...] = LENGTHS) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def make(tmp_path: Path, model: PreTrainedModel | None = None, **arguments: Any) -> SmallBatchTrainer:
    callbacks = arguments.pop("callbacks", None)
    defaults: dict[str, Any] = {"max_steps": 6, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, **{**defaults, **arguments}
    )
    model = tiny_model() if model is None else model
    return SmallBatchTrainer(
        model=model, args=args, train_dataset=rows(), data_collator=Collator(2), callbacks=callbacks
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_it_learns_counts_tokens_and_times_its_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_train_epochs=10, max_steps=-1, learning_rate=3e-3)
    before = trainer.evaluate(rows())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows())["eval_loss"] < before - 0.5
    assert trainer.tokens_seen == 10 * sum(LENGTHS)
    assert len(trainer.step_seconds) == len(trainer.optimizer_seconds) == 60
    assert all(0 < o < s for o, s in zip(trainer.optimizer_seconds, trainer.step_seconds, strict=True))
    assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())


def test_the_optimizer_hears_the_tokens_of_its_step_without_padding(tmp_path: Path) -> None:
    seen: list[int] = []

    class Listen(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            seen.append(optimizer.optimizer.tokens_per_step)

    trainer = make(tmp_path, per_device_train_batch_size=4, num_train_epochs=1, max_steps=-1, callbacks=[Listen()])
    trainer.train()
    assert len(seen) == 2 and sum(seen) == sum(LENGTHS)


@pytest.mark.parametrize("kind", ["adafactor", "adamw", "sgd", "muon", "sinkgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_released_and_kept_gradients_end_in_the_same_bits(tmp_path: Path, kind: str, tied: bool) -> None:
    ends = []
    for release in (True, False):
        trainer = make(tmp_path, tiny_model(tied=tied, hidden=128), token_optimizer=kind, gradient_release=release)
        trainer.train()
        ends.append((weights(trainer.model), [log["grad_norm"] for log in trainer.state.log_history[:-1]]))
    for name, released in ends[0][0].items():
        assert torch.equal(released, ends[1][0][name]), name
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6) and min(ends[0][1]) > 0


def test_the_loss_and_the_norm_that_are_logged_are_the_models(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    trainer = make(tmp_path, model, max_steps=1, cast_weights=False, stochastic_rounding=False, learning_rate=0.0)
    trainer.train()
    loss = None
    for row in rows():
        batch = Collator(2)([row])
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        if loss.item() == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-4):
            assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
            return
    raise AssertionError("no example has the loss that was logged")


def test_hooks_come_off_when_training_ends_or_fails(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop here")

    for callbacks in ([], [Fail()]):
        trainer = make(tmp_path, tiny_model(tied=True), callbacks=callbacks)
        if callbacks:
            with pytest.raises(RuntimeError, match="stop here"):
                trainer.train()
        else:
            trainer.train()
        assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
        assert not trainer.model.get_input_embeddings().sparse
        assert not trainer._token_optimizer.releases_gradients


def test_a_smaller_batch_is_tried_where_memory_ends_within_backward(tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, max_steps=3)

    def memory_ends(gradient: torch.Tensor) -> None:
        if trainer._train_batch_size == 4 and trainer.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(memory_ends)
    trainer.train()
    assert trainer._train_batch_size < 4 and trainer.state.global_step == 3
    assert trainer._token_optimizer.steps == 4  # the first one, of the failed attempt, has changed the weights
    assert len(trainer.step_seconds) == len(trainer.optimizer_seconds) == 3


def _poison(trainer: SmallBatchTrainer, steps: set[int]) -> list[int]:
    """Makes the head's loss NaN in these steps; returns the list of steps whose backward ran."""
    head = trainer._find_head()
    assert head is not None
    calls, backwards = [0], []

    class Poisoned(type(head)):  # type: ignore[misc]
        def loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = calls[0]
            calls[0] += 1
            loss: torch.Tensor = super().loss(*args, **kwargs)
            loss.register_hook(lambda grad: backwards.append(step))
            return loss * float("nan") if step in steps else loss

    trainer._head = Poisoned(head.linear, head.scale, head.softcap)
    return backwards


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    backwards = _poison(trainer, {1, 2})
    trainer.train()
    optimizer = trainer._token_optimizer
    assert optimizer is not None
    assert backwards == [0, 3, 4, 5]
    assert trainer.skipped_steps == optimizer.skipped_steps == 2 and optimizer.steps == 4
    assert trainer.tokens_seen == optimizer.tokens_seen < sum(LENGTHS)
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[-2]["skipped_steps"] == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("token_optimizer", ["adafactor", None])
def test_too_many_such_steps_in_a_row_end_training(tmp_path: Path, token_optimizer: str | None) -> None:
    trainer = make(tmp_path, max_skipped_steps=3, token_optimizer=token_optimizer)
    before = weights(trainer.model)
    _poison(trainer, {0, 1, 2})
    with pytest.raises(TrainingError, match="3 steps in a row.*max_skipped_steps"):
        trainer.train()
    assert_same(trainer.model, before)
    assert trainer.skipped_steps == 3


def test_only_steps_in_a_row_count_against_the_limit(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_skipped_steps=3)
    _poison(trainer, {0, 1, 3, 4})
    trainer.train()
    assert trainer.skipped_steps == 4


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    accumulated = make(tmp_path, gradient_accumulation_steps=3, gradient_release=False, max_steps=2, learning_rate=1e-3)
    accumulated.train()
    optimizer = accumulated._token_optimizer
    assert optimizer is not None and optimizer.steps == 2 and optimizer.tokens_seen == sum(LENGTHS)
    whole = make(tmp_path, per_device_train_batch_size=3, max_steps=2, learning_rate=1e-3)
    whole.train()
    first = [t.state.log_history[0] for t in (accumulated, whole)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-2)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=3e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointed_activations_do_not_change_the_weights(tmp_path: Path, kind: str) -> None:
    ends = []
    for checkpointing in (False, True):
        model = tiny_model(kind)
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        trainer = make(tmp_path, model, gradient_checkpointing=checkpointing)
        trainer.train()
        ends.append(weights(trainer.model))
    for name, kept in ends[0].items():
        assert torch.equal(kept, ends[1][name]), name


def test_gradients_alive_at_once_stay_within_the_two_largest_parameters(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny_model(tied=True, layers=4), max_steps=2)
    parameters = list(trainer.model.parameters())
    highest = 0

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for p in parameters:  # after the trainer's own hooks, so that these see what is left
                p.register_hook(self.look)

        def look(self, grad: torch.Tensor) -> torch.Tensor:
            nonlocal highest
            alive = sum(p.grad.numel() for p in parameters if p.grad is not None)
            held = trainer._tied._head_weight
            alive += held.grad.numel() if held is not None and held.grad is not None else 0
            highest = max(highest, alive + (0 if grad.is_sparse else grad.numel()))
            return grad

    trainer.add_callback(Watch())
    trainer.train()
    largest = sorted((p.numel() for p in parameters), reverse=True)[:2]
    assert 0 < highest <= sum(largest)


def test_a_float32_model_is_cast_with_a_note_unless_told_not_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(dtype=torch.float32, tied=True)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with caplog.at_level(logging.WARNING):
        make(tmp_path, model)
    assert "cast to bfloat16" in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for kept in ({"cast_weights": False}, {"stochastic_rounding": False}, {"token_optimizer": None}):
        model = tiny_model(dtype=torch.float32)
        make(tmp_path, model, **kept)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float16_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float16.*bfloat16"):
        make(tmp_path, tiny_model(dtype=torch.float16))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matrices_and_the_rest_are_groups_of_their_own(tmp_path: Path, decay: float) -> None:
    model = tiny_model(tied=False)
    trainer = make(tmp_path, model, token_optimizer="muon", weight_decay=decay, rest_lr_ratio=0.5)
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        (group["matrices"], group["weight_decay"], {names[parameter] for parameter in group["params"]})
        for group in optimizer.param_groups
    ]
    outer = {"model.embed_tokens.weight", "lm_head.weight"}
    norms = {name for name in names.values() if "norm" in name}
    inner = set(names.values()) - outer - norms
    if decay:
        assert groups == [(True, decay, inner), (True, 0.0, norms), (False, decay, outer)]
    else:
        assert groups == [(True, 0.0, inner | norms), (False, 0.0, outer)]
    assert {group["rest_lr_ratio"] for group in optimizer.param_groups} == {0.5}


def test_what_an_optimizer_cannot_be_set_to_is_an_argument_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, token_optimizer="sinkgd", beta1=0.9)
    with pytest.raises(ArgumentError, match="sinkgd cannot be made: beta1 has no effect"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps=1", "gradient_release=False"]),
        ({"max_grad_norm": 1.0}, ["max_grad_norm=0", "gradient_release=False"]),
        ({"beta2": 0.999, "second_moment_half_life": 1000.0}, ["beta2", "second_moment_half_life", "Remove one"]),
        (
            {"token_optimizer": "sgd", "momentum": 0.9, "momentum_half_life": 100.0},
            ["momentum_half_life", "Remove one"],
        ),
        ({"token_optimizer": "sgd", "beta2": 0.9}, ["beta2", "no effect", "adafactor or adamw"]),
        ({"token_optimizer": None, "clip_threshold": 1.0}, ["clip_threshold", "Remove it"]),
        ({"token_optimizer": "adam"}, ["'adam'", "adafactor, adamw, sgd"]),
        ({"token_optimizer": "adamw", "nesterov": True}, ["nesterov", "no effect", "to muon"]),
        ({"fp16": True}, ["fp16", "bf16=True"]),
        ({"learning_rate": -1e-4}, ["learning_rate", "at least 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"max_skipped_steps": 0}, ["max_skipped_steps", "at least 1"]),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, ["use_reentrant", "gradient_release=False"]),
    ],
)
def test_contradictions_are_refused_with_both_ways_out(
    tmp_path: Path, arguments: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        SmallBatchTrainingArguments(output_dir=str(tmp_path), **arguments)
    assert isinstance(error.value, SbftError)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_settings_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, second_moment_half_life=1234.0, weight_decay=0.1, clip_threshold=0.5, relative_step=False, seed=9,
        min_dim_size_to_factor=64,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[0]
    assert group["second_moment_half_life"] == 1234.0 and group["clip_threshold"] == 0.5
    assert group["min_dim_size_to_factor"] == 64
    assert group["relative_step"] is False and group["lr"] == 1e-4 and optimizer.seed == 9
    decayed, kept = ([p.dim() for p in group["params"]] for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[1]["weight_decay"] == 0.0
    assert set(decayed) == {2} and set(kept) == {1}
    with pytest.raises(ArgumentError, match="clip_threshold"):
        make(tmp_path, clip_threshold=-1.0).create_optimizer()


def test_an_optimizer_of_torch_trains_as_in_a_plain_trainer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 1,
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
    }
    model = tiny_model(dtype=torch.float32)
    plain = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows(), data_collator=Collator(2))
    plain.train()
    ours = SmallBatchTrainer(
        model=tiny_model(dtype=torch.float32),
        args=SmallBatchTrainingArguments(token_optimizer=None, **settings),
        train_dataset=rows(),
        data_collator=Collator(2),
    )
    ours.train()
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-5)
    assert ours.tokens_seen > 0 and min(ours.optimizer_seconds) > 0


def test_an_unknown_head_trains_with_the_models_own_loss_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tied=False)
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, model)
        trainer.train()
    assert caplog.text.count("logits of all tokens") == 1
    assert trainer.state.log_history[0]["loss"] > 0


def test_evaluation_makes_no_logits_and_finds_the_same_loss(tmp_path: Path) -> None:
    model = tiny_model()
    found = make(tmp_path, model)
    shapes: list[torch.Size] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    loss = found.evaluate(rows())["eval_loss"]
    handle.remove()
    # A few tokens: the only trial of the head.
    assert sum(shape.numel() for shape in shapes) <= 18 * 512 and shapes[-1].numel() == 0
    plain = make(tmp_path, model, logits_free_loss=False).evaluate(rows())["eval_loss"]
    assert loss == pytest.approx(plain, rel=1e-2)


def test_with_liger_the_models_own_patched_loss_is_used(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.args.use_liger_kernel = True
    calls: list[bool] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: calls.append("labels" in inputs), with_kwargs=True
    )
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert calls == [True] and loss > 0


def test_pretraining_has_its_own_defaults(tmp_path: Path) -> None:
    args = SmallBatchTrainingArguments.for_pretraining(output_dir=str(tmp_path), max_steps=200, report_to=[])
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(200) == 10
    assert args.token_optimizer_settings()["second_moment_half_life"] == 10_000_000
    fixed = SmallBatchTrainingArguments.for_pretraining(output_dir=str(tmp_path), beta2=0.99, report_to=[])
    assert fixed.second_moment_half_life is None and fixed.token_optimizer_settings()["beta2"] == 0.99
    classic = SmallBatchTrainingArguments.for_pretraining(output_dir=str(tmp_path), schedule="power", report_to=[])
    assert classic.second_moment_half_life is None
    plain = SmallBatchTrainingArguments.for_pretraining(output_dir=str(tmp_path), token_optimizer="sgd", report_to=[])
    assert plain.second_moment_half_life is None and plain.lr_scheduler_type == "cosine"
