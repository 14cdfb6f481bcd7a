"""A batch that doubles during a run: how many examples each step has, which ones, and at what learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from sbft.errors import RecipeError


@dataclass(frozen=True)
class BatchSchedule:
    """Batch sizes that start at `first` and double after every `doubling_examples` further examples.

    It counts in examples, so that the size of a step follows from the step's number alone and a run can be resumed at any step.
    If all examples have the same length, as in pretraining, tokens are proportional to examples.
    """

    first: int
    """Examples in the first step."""
    doubling_examples: int
    largest: int
    """Examples in a step at most."""

    def size(self, seen: int) -> int:
        """Examples in a step, when `seen` examples came before it."""
        doublings = min(seen // self.doubling_examples, self.largest.bit_length())  # more would exceed `largest` anyway
        return min(self.first << doublings, self.largest)

    def seen(self, steps: int) -> list[int]:
        """Examples seen before each of the first `steps` steps, and after the last: `steps + 1` numbers."""
        seen = [0]
        for _ in range(steps):
            seen.append(seen[-1] + self.size(seen[-1]))
        return seen

    def steps(self, examples: int) -> int:
        """Steps until at least `examples` examples were seen."""
        steps = seen = 0
        while seen < examples:
            seen += self.size(seen)
            steps += 1
        return steps


class ScheduledBatches(Sampler[list[int]]):
    """Indices of the examples in every step of a run: pass after pass over all examples, each in a random order.

    A batch may hold the end of one pass and the beginning of the next, so that every step has the size in the schedule. The
    order depends on the seed alone.

    Args:
        count: examples in the data.
        schedule: of the batch size.
        steps: of the run.
        seed: of the order.
    """

    def __init__(self, count: int, schedule: BatchSchedule, steps: int, seed: int) -> None:
        self._count, self._schedule, self._steps, self._seed = count, schedule, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """One list of indices per step."""
        indices = self._indices()
        seen = self._schedule.seen(self._steps)
        for begin, end in itertools.pairwise(seen):
            yield list(itertools.islice(indices, end - begin))

    def _indices(self) -> Iterator[int]:
        for number in itertools.count():
            order = torch.randperm(self._count, generator=torch.Generator().manual_seed(self._seed + number))
            yield from order.tolist()


def rates_by_examples(
    optimizer: torch.optim.Optimizer, arguments: TrainingArguments, schedule: BatchSchedule, steps: int
) -> LambdaLR:
    """The learning rate schedule that the arguments name, as a function of the examples seen instead of the steps.

    A `warmup_steps` below 1 is a share of the examples; otherwise the warm-up ends with the examples of that many steps. With a
    batch that never grows it is the usual schedule.

    Raises:
        RecipeError: if the schedule does not depend on the step's number alone.
    """
    seen = schedule.seen(steps)
    warmup = arguments.get_warmup_steps(seen[-1])
    if arguments.warmup_steps >= 1:
        warmup = seen[min(warmup, steps)]
    settings: Any = arguments.lr_scheduler_kwargs  # transformers has parsed it to a dict
    # It has the same rate, because some schedules have an absolute rate to end at.
    placeholder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optimizer.defaults["lr"])
    by_examples = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=placeholder,
        num_warmup_steps=warmup,
        num_training_steps=seen[-1],
        scheduler_specific_kwargs=settings,
    )
    if not isinstance(by_examples, LambdaLR):
        name = SchedulerType(arguments.lr_scheduler_type).value
        raise RecipeError(
            f"lr_scheduler_type is {name}, which depends on more than the progress of the run, so it cannot follow a batch "
            "that doubles. Use constant, linear or cosine, with or without a warm-up, or a constant batch size."
        )
    (rate,) = by_examples.lr_lambdas
    return LambdaLR(optimizer, lambda step: float(rate(seen[min(step, steps)])))
