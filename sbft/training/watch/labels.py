"""Warns of steps without labels, which learn nothing and whose loss of zero looks like success."""

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

# If none of the first so many steps has a label, the warning comes at once.
_FIRST = 10
_WHY = (
    "every label in their batches is -100 (or belongs to the first token of a row, which is not predicted). Check what masks "
    "the labels, and whether the answers are beyond the maximum length."
)


class LabelWatch(TrainerCallback):
    """Counts steps that have no label, and warns: early if none of the first steps has one, else at the end.

    Attributes:
        unlabelled_steps: since `train` began.
    """

    def __init__(self) -> None:
        self.unlabelled_steps = self._steps = 0
        self._warned = self._warned_of_evaluation = False

    def add_step(self, labels: int | None) -> None:
        """Count a step with this number of labels, all ranks together; None if it is unknown."""
        self._steps += 1
        self.unlabelled_steps += labels == 0

    @property
    def none_so_far(self) -> bool:
        """Whether no step had a label."""
        return 0 < self.unlabelled_steps == self._steps

    def leave_out_of_evaluation(self) -> None:
        """Warn once that evaluation batches without labels are left out of the mean."""
        if not self._warned_of_evaluation:
            self._warned_of_evaluation = True
            logger.warning("Some evaluation batches have no label; they are left out of the mean loss.")

    def hint(self) -> str:
        """For the message on a loss that is not finite: a sentence if no step had a label, else nothing."""
        return f"None of the steps had a label to learn from: {_WHY} " if self.none_so_far else ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the counts."""
        self.__init__()  # type: ignore[misc]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warn if none of the first steps had a label."""
        if self._steps == _FIRST and self.none_so_far and state.is_world_process_zero:
            self._warned = True
            logger.warning(f"None of the first {_FIRST} steps had a label to learn from: {_WHY}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of the steps without labels, if that was not done before."""
        if not self.unlabelled_steps or not state.is_world_process_zero or (self._warned and self.none_so_far):
            return
        logger.warning(f"{self.unlabelled_steps} of {self._steps} steps had no label to learn from: {_WHY}")


def warn_of_masked_end(collator: Any) -> None:
    """Warn of transformers' collator if the pad token is also the end token: it removes the labels of both."""
    if not isinstance(collator, DataCollatorForLanguageModeling) or collator.mlm:
        return
    tokenizer = collator.tokenizer
    if tokenizer.eos_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning(
            f"{tokenizer.eos_token} is both the pad and the end token, and DataCollatorForLanguageModeling removes the labels "
            "of all padding: the model does not learn to stop. Set tokenizer.pad_token to another token, or pass examples with "
            "labels and a collator that keeps them."
        )
