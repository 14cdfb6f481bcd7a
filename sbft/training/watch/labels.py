"""Watches a run for steps without anything to learn from, whose loss is zero and which say nothing of it."""

from __future__ import annotations

import logging
from typing import Any

from transformers import (
    DataCollatorForLanguageModeling,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger(__name__)

# Steps at the beginning after which it is said at once that none of them had a label.
_FIRST = 10
_WHY = (
    "every label in their batches is -100 (or stands at the first token of a row, which nothing predicts). Look at what masks "
    "the labels, and whether the answers lie behind the maximal length."
)


class LabelWatch(TrainerCallback):
    """Counts steps that have no label, and says so: at once where none of the first steps has one, else at the end.

    Attributes:
        unlabelled_steps: of this session.
    """

    def __init__(self) -> None:
        self.unlabelled_steps = self._steps = 0
        self._warned = self._said_of_evaluation = False

    def add_step(self, labels: int | None) -> None:
        """Count a step with so many labels, all ranks together; None where nobody knows."""
        self._steps += 1
        self.unlabelled_steps += labels == 0

    @property
    def none_so_far(self) -> bool:
        """Whether no step had a label."""
        return 0 < self.unlabelled_steps == self._steps

    def leave_out_of_evaluation(self) -> None:
        """Say once that a batch of the evaluation without labels is left out of its mean."""
        if not self._said_of_evaluation:
            self._said_of_evaluation = True
            logger.warning("Some batches of the evaluation have no label; they are left out of its mean loss.")

    def hint(self) -> str:
        """What to look at first where the loss is no number."""
        return f"None of the steps had a label to learn from: {_WHY} " if self.none_so_far else ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count anew."""
        self.__init__()  # type: ignore[misc]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say at once what is wrong with all."""
        if self._steps == _FIRST and self.none_so_far and state.is_world_process_zero:
            self._warned = True
            logger.warning(f"None of the first {_FIRST} steps had a label to learn from: {_WHY}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many there were."""
        if not self.unlabelled_steps or not state.is_world_process_zero or (self._warned and self.none_so_far):
            return
        logger.warning(f"{self.unlabelled_steps} of {self._steps} steps had no label to learn from: {_WHY}")


def warn_of_masked_end(collator: Any) -> None:
    """Warn of transformers' collator where padding is the end token, too: it takes the label of both away."""
    if not isinstance(collator, DataCollatorForLanguageModeling) or collator.mlm:
        return
    tokenizer = collator.tokenizer
    if tokenizer.eos_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            f"{tokenizer.eos_token} is both the pad and the end token, and DataCollatorForLanguageModeling takes the label of "
            "all padding away: the model is not taught to stop. Set tokenizer.pad_token to another token, or give labels with "
            "the examples and a collator that keeps them."
        )
