"""The mixin on TRL's own trainer: same weights as without TRL, and TRL's metrics when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sbft.training.arguments import ArgumentError, SmallBatchArguments, SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchMixin, SmallBatchTrainer
from tests.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")


@dataclass
class SmallBatchSFTConfig(SmallBatchArguments, trl.SFTConfig):
    """TRL's arguments with small-batch training in front."""


class SmallBatchSFTTrainer(SmallBatchMixin, trl.SFTTrainer):
    """TRL's trainer with small-batch training in front."""


def _rows() -> Dataset:
    questions = [f"What is {a} plus {a + 1}?" for a in range(8)]
    answers = [f" The answer is {2 * a + 1}." for a in range(8)]
    return Dataset.from_dict({"prompt": questions, "completion": answers})


def _make(tmp_path: Path, **arguments: Any) -> SmallBatchSFTTrainer:
    args = SmallBatchSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=8,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{"logging_steps": 1, "save_strategy": "no", "learning_rate": 2e-3, **arguments},
    )
    return SmallBatchSFTTrainer(
        model=tiny_model(), args=args, train_dataset=_rows(), eval_dataset=_rows(), processing_class=tiny_tokenizer()
    )


def test_arguments_are_ours_where_we_have_an_opinion_and_trls_elsewhere(tmp_path: Path) -> None:
    args = SmallBatchSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.per_device_train_batch_size, args.learning_rate, args.bf16) == (1, 1e-4, False)
    assert args.max_length == trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True).max_length


def test_it_trains_to_the_weights_of_the_plain_trainer(tmp_path: Path) -> None:
    theirs = _make(tmp_path)
    theirs.train()
    history = theirs.state.log_history
    assert theirs.tokens_seen > 0 and history[-2]["loss"] < history[0]["loss"]
    assert theirs._token_optimizer is not None and theirs._token_optimizer.steps == 8
    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=8, report_to=[], save_strategy="no", learning_rate=2e-3,
        remove_unused_columns=False,  # TRL's older collators make labels from a column that no model takes
    )  # fmt: skip
    ours = SmallBatchTrainer(
        model=tiny_model(), args=args, train_dataset=theirs.train_dataset, data_collator=theirs.data_collator
    )
    ours.train()
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, dict(theirs.model.named_parameters())[name]), name


def test_trl_logs_what_it_logs_of_its_own_loss(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    settings["learning_rate"] = 2e-2
    ours, theirs = _make(tmp_path, **settings), _make(tmp_path, logits_free_loss=False, **settings)
    for trainer in (ours, theirs):
        trainer.train()
    assert ours._head is not None and theirs._head is None
    history = [[log for log in one.state.log_history if "train_runtime" not in log] for one in (ours, theirs)]
    assert len(history[0]) == len(history[1]) == 6
    for found, expected in zip(*history, strict=True):
        assert found.keys() == expected.keys()
        prefix = "eval_" if "eval_loss" in found else ""
        assert {prefix + name for name in ("mean_token_accuracy", "entropy", "num_tokens", "loss")} <= found.keys()
        for name in ("num_tokens", "mean_token_accuracy", "entropy", "loss"):
            assert found[prefix + name] == pytest.approx(expected[prefix + name], rel=2e-2, abs=1e-6), name
    assert any(log["eval_mean_token_accuracy"] > 0 for log in history[0] if "eval_loss" in log)


def test_the_best_checkpoint_may_be_that_of_the_best_token_accuracy(tmp_path: Path) -> None:
    trainer = _make(
        tmp_path, learning_rate=2e-2, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_mean_token_accuracy", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    accuracies = [log["eval_mean_token_accuracy"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer._head is not None and trainer.state.best_metric == max(accuracies)


def test_a_trainer_of_trl_with_another_loss_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    @dataclass
    class Config(SmallBatchArguments, GKDConfig):
        """As a user writes it."""

    class SmallBatchGKD(SmallBatchMixin, GKDTrainer):
        """Likewise."""

    args = Config(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, lmbda=0.0, cast_weights=False, save_strategy="no"
    )
    chats = [{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}] * 4
    trainer = SmallBatchGKD(
        model=tiny_model(dtype=torch.float32), teacher_model=tiny_model(dtype=torch.float32), args=args,
        train_dataset=Dataset.from_list(chats), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.teacher_model.load_state_dict(trainer.model.state_dict())
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert abs(trainer.compute_loss(trainer.model, batch).item()) < 1e-4
    trainer.train()
    assert caplog.text.count("The loss is that of GKDTrainer.compute_loss") == 1


def test_another_loss_of_trl_is_kept(tmp_path: Path) -> None:
    dft, nll = _make(tmp_path, loss_type="dft"), _make(tmp_path)
    dft.train()
    nll.train()
    assert dft.state.log_history[0]["loss"] < 0.1 * nll.state.log_history[0]["loss"]


def test_arguments_of_the_wrong_kind_are_refused_with_the_way_out(tmp_path: Path) -> None:
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ArgumentError, match="inherits from SmallBatchArguments and SFTConfig"):
        SmallBatchSFTTrainer(model=tiny_model(), args=args, train_dataset=_rows(), processing_class=tiny_tokenizer())
