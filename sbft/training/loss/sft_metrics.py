"""The metrics that TRL's SFTTrainer logs, for batches whose loss it does not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbft.training.batches.batch_counts import count_in


class SftMetrics:
    """Gathers entropy, token accuracy and tokens of batches, and hands them to the trainer's `log`.

    TRL waits for the device and for the other ranks after each batch; here both wait until something is logged.

    Args:
        trainer: an `SFTTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._batches: dict[str, list[tuple[Tensor, int]]] = {"train": [], "eval": []}

    def add(self, statistics: Tensor, inputs: dict[str, Any]) -> None:
        """Add one batch.

        Args:
            statistics: of a batch, as `TokenStatistics.row` returns them.
            inputs: the batch.
        """
        self._batches[self._mode()].append((statistics, count_in(inputs).number))

    def hand_over(self) -> None:
        """Hand over what was gathered in the model's current mode, training or evaluation. All ranks have to call this."""
        trainer, mode = self._trainer, self._mode()
        batches, self._batches[mode] = self._batches[mode], []
        if not batches:
            return
        rows = torch.stack([row for row, _ in batches])
        rows = torch.cat((rows, rows.new_tensor([[tokens] for _, tokens in batches])), 1)
        if trainer.accelerator.num_processes > 1:
            rows = trainer.accelerator.gather(rows.unsqueeze(0)).sum(0)
        metrics = trainer._metrics[mode]
        for correct, entropy, labelled, tokens in rows.tolist():
            metrics["entropy"].append(entropy / max(labelled, 1))
            metrics["mean_token_accuracy"].append(correct / max(labelled, 1))
            if mode == "train":
                trainer._total_train_tokens += int(tokens) // trainer.get_tp_size()
        metrics["num_tokens"] = [trainer._total_train_tokens]

    def _mode(self) -> str:
        return "train" if self._trainer.model.training else "eval"
