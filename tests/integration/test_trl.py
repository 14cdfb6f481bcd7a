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
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        learning_rate=2e-3,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **arguments,
    )
    return SmallBatchSFTTrainer(model=tiny_model(), args=args, train_dataset=_rows(), processing_class=tiny_tokenizer())


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


def test_without_the_logits_free_loss_trl_reports_its_metrics(tmp_path: Path) -> None:
    fused, plain = _make(tmp_path), _make(tmp_path, logits_free_loss=False)
    fused.train()
    plain.train()
    assert "mean_token_accuracy" not in fused.state.log_history[0]
    assert {"mean_token_accuracy", "entropy", "grad_norm"} <= plain.state.log_history[0].keys()
    assert plain.state.log_history[0]["loss"] == pytest.approx(fused.state.log_history[0]["loss"], rel=2e-2)


def test_another_loss_of_trl_is_kept(tmp_path: Path) -> None:
    dft, nll = _make(tmp_path, loss_type="dft"), _make(tmp_path)
    dft.train()
    nll.train()
    assert dft.state.log_history[0]["loss"] < 0.1 * nll.state.log_history[0]["loss"]


def test_arguments_of_the_wrong_kind_are_refused_with_the_way_out(tmp_path: Path) -> None:
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ArgumentError, match="inherits from SmallBatchArguments and SFTConfig"):
        SmallBatchSFTTrainer(model=tiny_model(), args=args, train_dataset=_rows(), processing_class=tiny_tokenizer())
