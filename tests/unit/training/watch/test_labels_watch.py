"""Steps with nothing to learn from are counted, and reported once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, DataCollatorForLanguageModeling

from sbft.data.collate import Collator
from sbft.errors import TrainingError
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.batches.batch_counts import labels_of, targets_of
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model, tiny_tokenizer

LABELLED = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
MASKED = {"input_ids": [3, 4, 5], "labels": [-100] * 3}
FIRST_ONLY = {"input_ids": [3, 4, 5], "labels": [3, -100, -100]}


def trained(folder: Path, examples: list[dict[str, Any]], **settings: Any) -> SmallBatchTrainer:
    args = SmallBatchTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", num_train_epochs=1, **settings
    )
    trainer = SmallBatchTrainer(tiny_model(), args, Collator(2), train_dataset=examples)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if "label to learn from" in one.getMessage()]


@pytest.mark.parametrize(
    ("examples", "settings", "unlabelled", "begins"),
    [
        ([LABELLED] * 4, {}, 0, None),
        ([LABELLED, MASKED, LABELLED, FIRST_ONLY], {}, 2, "2 of 4 steps had no label"),
        ([MASKED] * 3, {}, 3, "3 of 3 steps had no label"),
        ([MASKED] * 14, {}, 14, "None of the first 10 steps had a label"),
        ([MASKED, LABELLED] * 2, {"gradient_accumulation_steps": 2, "gradient_release": False}, 0, None),
    ],
    ids=["none", "some", "all", "all-of-many", "accumulated"],
)
def test_steps_without_labels_are_counted_and_said_once(
    examples: list[dict[str, Any]],
    settings: dict[str, Any],
    unlabelled: int,
    begins: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="sbft"):
        assert trained(tmp_path, examples, **settings).unlabelled_steps == unlabelled
    found = said(caplog)
    assert len(found) == (begins is not None) and (begins is None or found[0].startswith(begins))


def test_where_the_loss_is_no_number_for_want_of_labels_the_error_names_them(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite in 3 steps.*None of the steps had a label to learn from"):
        trained(tmp_path, [MASKED] * 4, logits_free_loss=False, max_skipped_steps=3)


@pytest.mark.parametrize(
    ("batch", "targets"),
    [
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}, 1),
        ({"pixel_values": torch.ones(2, 3), "labels": torch.tensor([1, 0])}, 2),
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([[4], [-100]])}, 1),
        ({"input_ids": torch.ones(2, 3), "labels": torch.tensor([0.5, 1.5])}, None),
        ({"input_ids": torch.ones(2, 3)}, None),
    ],
    ids=["causal", "classes", "other-length", "regression", "none"],
)
def test_labels_that_are_predicted_are_counted(batch: dict[str, Any], targets: int | None) -> None:
    assert targets_of(batch) == targets
    assert labels_of([batch, batch]) == (None if targets is None else 2 * targets)


def test_a_token_classifier_learns_from_first_tokens_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    row = {"input_ids": [5], "labels": [1], "attention_mask": [1]}
    args = SmallBatchTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    model = BertForTokenClassification(BertConfig(vocab_size=16, num_labels=3, **shape))
    trainer = SmallBatchTrainer(model, args, train_dataset=[row] * 2, eval_dataset=[row])
    trainer.train()
    assert trainer.unlabelled_steps == 0 and trainer.evaluate()["eval_loss"] > 0
    assert "no label" not in caplog.text


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_leaves_out_what_has_no_label(
    free: bool, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, [LABELLED], logits_free_loss=free, per_device_eval_batch_size=size)
    expected = trainer.evaluate([LABELLED] * 2)["eval_loss"]  # type: ignore[arg-type]
    assert "left out of the mean" not in caplog.text
    for rows in ([LABELLED, LABELLED, MASKED, MASKED], [MASKED, MASKED, LABELLED, LABELLED]):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
    assert caplog.text.count("left out of the mean") == 1


@pytest.mark.parametrize("same", [True, False])
def test_an_end_that_loses_its_label_as_padding_is_said(
    same: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    if same:
        tokenizer.pad_token = tokenizer.eos_token
    args = SmallBatchTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    SmallBatchTrainer(tiny_model(), args, collator)
    assert ("does not learn to stop" in caplog.text) is same
    labels = collator([{"input_ids": [3, 4, tokenizer.eos_token_id]}])["labels"]
    assert bool(labels[0, -1] == -100) is same
