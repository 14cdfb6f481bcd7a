"""Arguments of any class, passed optimizers, searches, and checkpoints of other trainers: they work or are refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

import sbft
from sbft import SmallBatchTrainer, SmallBatchTrainingArguments, small_batch
from sbft.training.arguments import ArgumentError
from tests.tiny import tiny_model

ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}, {"input_ids": [7, 8, 9, 5], "labels": [7, 8, 9, 5]}] * 4
BASIC: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 3}


def arguments(folder: Path, **settings: Any) -> SmallBatchTrainingArguments:
    return SmallBatchTrainingArguments(str(folder), **{**BASIC, **settings})


def model(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model("llama", hidden=32, layers=1, dtype=dtype)


def warnings_of(caplog: Any, words: str) -> list[str]:
    return [record.message for record in caplog.records if words in record.message]


# Arguments of any class


def test_plain_arguments_are_taken_with_one_line_that_says_what_that_set(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), **BASIC, weight_decay=0.1, lr_scheduler_type="cosine")
    trainer = SmallBatchTrainer(model(), args, train_dataset=ROWS)
    made = trainer.args
    assert type(made) is SmallBatchTrainingArguments and type(args) is TrainingArguments and args.learning_rate == 5e-5
    assert (made.weight_decay, made.lr_scheduler_type, made.max_steps) == (0.1, "cosine", 3)
    assert (made.learning_rate, made.per_device_train_batch_size, made.max_grad_norm) == (1e-4, 1, 0.0)
    (line,) = warnings_of(caplog, "small_batch(TrainingArguments)")
    assert "learning_rate=0.0001 (was 5e-05)" in line and "adafactor" in line and "adamw_torch_fused" in line
    assert "cosine" not in line and "lr_scheduler_type" not in line
    trainer.train()
    assert type(trainer.optimizer.optimizer) is sbft.Adafactor  # type: ignore[union-attr]


def test_what_was_set_in_plain_arguments_stays(tmp_path, caplog):
    args = TrainingArguments(str(tmp_path), **BASIC, gradient_accumulation_steps=2, max_grad_norm=0.5, bf16=True)
    made = SmallBatchTrainer(model(), args, train_dataset=ROWS).args
    assert (made.gradient_accumulation_steps, made.max_grad_norm, made.gradient_release, made.bf16) == (2, 0.5, False, True)
    (line,) = warnings_of(caplog, "small_batch(TrainingArguments)")
    assert "not released, because of gradient_accumulation_steps=2 and max_grad_norm=0.5" in line


def test_no_arguments_are_taken_for_the_defaults(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for given in ((), (None,)):
        trainer = SmallBatchTrainer(model(), *given, train_dataset=ROWS)
        assert type(trainer.args) is SmallBatchTrainingArguments and trainer.args.output_dir == "trainer_output"
    assert len(warnings_of(caplog, "No args were passed")) == 2


@dataclass
class OwnArguments(TrainingArguments):
    """A user's own class."""

    beta: float = 0.1
    warmup_steps: float = 5


class DerivedArguments(small_batch(OwnArguments)):  # type: ignore[misc]
    """Derived from the class that was made from it."""


def test_the_class_for_a_trainers_arguments(tmp_path):
    made = small_batch(OwnArguments)
    assert made is small_batch(OwnArguments) and small_batch(made) is made
    assert small_batch(TrainingArguments) is SmallBatchTrainingArguments
    args = made(str(tmp_path), **BASIC, beta=0.3, second_moment_half_life=1000.0)
    assert isinstance(args, OwnArguments) and (args.beta, args.warmup_steps, args.learning_rate) == (0.3, 5, 1e-4)
    for one in (args, DerivedArguments(str(tmp_path), **BASIC, beta=0.3)):
        for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), replace(one)):
            assert type(again) is type(one) and again.to_dict() == one.to_dict()
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps=4"):
        made(str(tmp_path), **BASIC, gradient_accumulation_steps=4)
    with pytest.raises(ArgumentError, match="small_batch takes TrainingArguments"):
        small_batch(dict)


def test_training_arguments_of_a_checkpoint_load_in_another_process(tmp_path):
    args = small_batch(Seq2SeqTrainingArguments)(str(tmp_path), **BASIC, beta2=0.9, generation_max_length=7)
    torch.save(args, tmp_path / "training_args.bin")
    code = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False); "
        "print(type(args).__name__, args.beta2, args.generation_max_length)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "training_args.bin")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["SmallBatchSeq2SeqTrainingArguments", "0.9", "7"]


# Settings of others' optimizers


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ({"optim": "sgd"}, "token_optimizer=None to train with optim=sgd"),
        ({"optim": "adamw_torch"}, "Set token_optimizer in its place"),
        ({"optim_args": "amsgrad=True"}, "second_moment_half_life"),
        ({"optim_target_modules": ["q_proj"]}, "an adapter"),
        ({"adam_beta1": 0.8}, "beta1 or first_moment_half_life"),
        ({"adam_beta2": 0.95}, "beta2 or second_moment_half_life"),
        ({"adam_epsilon": 1e-6}, "optimizer_eps"),
    ],
)
def test_settings_of_transformers_optimizers_are_refused_beside_a_token_optimizer(setting, instead, tmp_path):
    with pytest.raises(ArgumentError, match=instead):
        arguments(tmp_path, **setting)
    assert arguments(tmp_path, **setting, token_optimizer=None).token_optimizer is None
    with pytest.raises(ArgumentError, match=r"sbft\.small_batch\(TrainingArguments\)"):
        SmallBatchTrainer(model(), TrainingArguments(str(tmp_path), **BASIC, **setting), train_dataset=ROWS)


def test_what_is_set_after_arguments_were_made_is_checked_too(tmp_path):
    changed = arguments(tmp_path).set_optimizer(name="sgd", learning_rate=0.1)
    with pytest.raises(ArgumentError, match="optim=sgd"):
        SmallBatchTrainer(model(), changed, train_dataset=ROWS)
    changed = arguments(tmp_path)
    changed.gradient_accumulation_steps = 4
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps=4"):
        SmallBatchTrainer(model(), changed, train_dataset=ROWS)


def test_optim_is_done_without_a_token_optimizer(tmp_path):
    trainer = SmallBatchTrainer(model(), arguments(tmp_path, token_optimizer=None, optim="sgd"), train_dataset=ROWS)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD  # type: ignore[union-attr]


@pytest.mark.parametrize("setting", [{"train_sampling_strategy": "group_by_length"}, {"auto_find_batch_size": True}])
def test_what_a_doubling_batch_would_not_follow_is_refused(setting, tmp_path):
    with pytest.raises(ArgumentError, match=f"{next(iter(setting))}.* has no effect"):
        arguments(tmp_path, batch_doubling_examples=4, largest_batch_size=4, **setting)


# Optimizers that are passed in


def _pass_in(made: Any, how: str) -> tuple[type[SmallBatchTrainer], dict[str, Any]]:
    if how == "optimizers":
        return SmallBatchTrainer, {"optimizers": (torch.optim.SGD(made.parameters(), lr=0.1), None)}
    if how == "class":
        return SmallBatchTrainer, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}

    class Mine(SmallBatchTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    return Mine, {}


@pytest.mark.parametrize("how", ["optimizers", "class", "override"])
def test_anothers_optimizer_is_used_with_a_warning_and_its_weights_stay_float32(how, tmp_path, caplog):
    made = model()
    trainer_class, given = _pass_in(made, how)
    trainer = trainer_class(made, arguments(tmp_path), train_dataset=ROWS, **given)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD  # type: ignore[union-attr]
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    (line,) = warnings_of(caplog, "token_optimizer=None to say so")
    assert "gradients are not released" in line and "nearest" not in line


def test_bfloat16_weights_under_anothers_optimizer_are_warned_of(tmp_path, caplog):
    made = model(torch.bfloat16)
    trainer_class, given = _pass_in(made, "optimizers")
    trainer_class(made, arguments(tmp_path), train_dataset=ROWS, **given).train()
    assert "rounded to nearest" in warnings_of(caplog, "token_optimizer=None to say so")[0]
    caplog.clear()
    trainer_class(made, arguments(tmp_path, token_optimizer=None), train_dataset=ROWS, **given).train()
    assert not warnings_of(caplog, "token_optimizer=None")


def test_a_token_optimizer_may_be_passed_as_a_class(tmp_path, caplog):
    given = (sbft.AdamW, {"lr": 1e-3, "second_moment_half_life": 50.0})
    trainer = SmallBatchTrainer(model(), arguments(tmp_path), train_dataset=ROWS, optimizer_cls_and_kwargs=given)
    trainer.train()
    optimizer: Any = trainer.optimizer.optimizer  # type: ignore[union-attr]
    assert type(optimizer) is sbft.AdamW and optimizer.tokens_seen == 3 * 4
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    assert not warnings_of(caplog, "token_optimizer=None to say so")


def test_settings_and_handles_that_would_have_no_effect_are_refused(tmp_path):
    made = model(torch.bfloat16)
    optimizer = sbft.Adafactor(made.parameters())
    given: Any = {"train_dataset": ROWS, "optimizers": (optimizer, None)}
    with pytest.raises(ArgumentError, match="second_moment_half_life=9 has no effect, because an optimizer was passed"):
        SmallBatchTrainer(made, arguments(tmp_path, second_moment_half_life=9), **given)
    with optimizer.count_tokens(made), pytest.raises(ArgumentError, match="counts tokens by itself"):
        SmallBatchTrainer(made, arguments(tmp_path), **given).train()
    with optimizer.release_gradients(), pytest.raises(ArgumentError, match="max_grad_norm"):
        SmallBatchTrainer(made, arguments(tmp_path, gradient_release=False, max_grad_norm=1.0), **given).train()
    SmallBatchTrainer(made, arguments(tmp_path), **given).train()
    assert optimizer.tokens_seen == 3 * 4


def test_deepspeed_is_refused(tmp_path):
    trainer = SmallBatchTrainer(model(), arguments(tmp_path), train_dataset=ROWS)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ArgumentError, match="DeepSpeed"):
        trainer._check_arguments()


# A search over settings


def _searching(folder: Path) -> SmallBatchTrainer:
    args = arguments(folder, eval_strategy="steps", eval_steps=3)
    return SmallBatchTrainer(args=args, train_dataset=ROWS, eval_dataset=ROWS, model_init=lambda: model())


def test_training_begins_anew_where_no_model_was_left(tmp_path):
    trainer = _searching(tmp_path)
    losses = []
    for rate in (1e-5, 1e-2, 1e-5):
        trainer.args.learning_rate = rate
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.model_wrapped = trainer.model = None  # as a search leaves them between two trials
    assert losses[1] < losses[0] == losses[2]


def test_a_trial_is_refused_what_arguments_are_refused(tmp_path):
    trainer = _searching(tmp_path)
    trainer.hp_search_backend = HPSearchBackend.WANDB  # its trials are dictionaries
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps=2"):
        trainer.train(trial={"gradient_accumulation_steps": 2})


def test_optuna_searches(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer = _searching(tmp_path)

    def space(trial: Any) -> dict[str, float]:
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)}

    best: Any = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert best.objective > 0


# Checkpoints of transformers' own Trainer


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_checkpoint_of_another_trainer_is_resumed_with_averages_anew(decay, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    settings = {**BASIC, **saving, "lr_scheduler_type": "linear"}
    theirs = TrainingArguments(str(tmp_path), **settings, weight_decay=decay, per_device_train_batch_size=1)
    Trainer(model(torch.bfloat16), theirs, train_dataset=ROWS).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    args = arguments(tmp_path / "ours", **{**settings, "max_steps": 8, "learning_rate": 1e-2})
    trainer = SmallBatchTrainer(model(torch.bfloat16), args, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 8 and trainer._token_optimizer.steps == 6  # type: ignore[union-attr]
    assert len(warnings_of(caplog, "averages and the count of tokens start from zero")) == 1
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if entry["step"] > 2 and "loss" in entry]
    assert rates == pytest.approx([1e-2 * (8 - step) / 8 for step in range(2, 8)])

    kept = arguments(tmp_path / "theirs", **{**settings, "max_steps": 6}, token_optimizer=None, weight_decay=decay)
    caplog.clear()
    SmallBatchTrainer(model(torch.bfloat16), kept, train_dataset=ROWS).train(resume_from_checkpoint=checkpoint)
    assert not warnings_of(caplog, "start from zero")
