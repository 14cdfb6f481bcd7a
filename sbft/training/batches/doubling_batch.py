"""The trainer's part of a batch that doubles: its data loader, and the learning rate that follows it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from sbft.training.arguments import ArgumentError
from sbft.training.batches.batch_schedule import ScheduledBatches, rates_by_examples

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DoublingBatch(_Base):
    """Put before a `Trainer`: follows the batch schedule of its arguments, if they have one."""

    args: Any

    def _check_batch_schedule(self) -> None:
        """
        Raises:
            ArgumentError: if the batch schedule cannot be followed here.
        """
        if self.args.batch_schedule is None:
            return
        if self.accelerator.num_processes > 1:
            raise ArgumentError(
                f"batch_doubling_examples is {self.args.batch_doubling_examples} with {self.accelerator.num_processes} "
                "processes, but it works in one process only. Run one process, or leave it out."
            )
        if self.train_dataset is not None and not has_length(self.train_dataset):
            raise ArgumentError(
                f"batch_doubling_examples is {self.args.batch_doubling_examples}, but the training set has no length: it is "
                "streamed. Leave batch_doubling_examples out, or use a training set that has a length."
            )

    def get_train_dataloader(self) -> Any:
        """As in `Trainer`; with a batch schedule, the whole run is one pass over the loader."""
        loader: Any = super().get_train_dataloader()
        schedule = self.args.batch_schedule
        if schedule is None:
            return loader
        count = len(loader.dataset)
        if self.args.max_steps <= 0:
            self.args.max_steps = schedule.steps(math.ceil(self.args.num_train_epochs * count))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return DataLoader(
            loader.dataset,
            batch_sampler=ScheduledBatches(count, schedule, self.args.max_steps, seed),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in `Trainer`; with a batch schedule, the learning rate depends on the examples seen."""
        schedule = self.args.batch_schedule
        if schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        own: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = rates_by_examples(own, self.args, schedule, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler
