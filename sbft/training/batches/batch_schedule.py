"""A batch that doubles while a run goes on: how large each step is, what is in it, and the learning rate that follows."""

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
    """Batch sizes that begin at `first` and double whenever `doubling_examples` more examples were seen.

    It counts in examples, so that the size of a step follows from the step's number alone, and a resumed run goes on where it
    was cut off. Where all examples have the same length, as in pretraining, tokens are proportional to them.
    """

    first: int
    """Examples in the first step."""
    doubling_examples: int
    largest: int
    """No step has more."""

    def size(self, seen: int) -> int:
        """Examples in the step before which so many were seen."""
        doublings = min(seen // self.doubling_examples, self.largest.bit_length())  # more would only be cut off
        return min(self.first << doublings, self.largest)

    def seen(self, steps: int) -> list[int]:
        """Examples seen before each of so many steps, and after the last; `steps + 1` numbers."""
        seen = [0]
        for _ in range(steps):
            seen.append(seen[-1] + self.size(seen[-1]))
        return seen

    def steps(self, examples: int) -> int:
        """Steps until at least so many examples were seen."""
        steps = seen = 0
        while seen < examples:
            seen += self.size(seen)
            steps += 1
        return steps


class ScheduledBatches(Sampler[list[int]]):
    """Indices of the examples of every step of a run: all examples in random order, again and again.

    A pass over the data does not end a batch, so that every step is as large as the schedule says. The order follows from the
    seed alone.

    Args:
        count: examples there are.
        schedule: of the batch.
        steps: of the run.
        seed: of the order.
    """

    def __init__(self, count: int, schedule: BatchSchedule, steps: int, seed: int) -> None:
        self._count, self._schedule, self._steps, self._seed = count, schedule, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """A list for each step."""
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
    """The learning rate schedule that the arguments name, drawn over the examples seen in the place of the steps.

    A fractional `warmup_steps` is that part of the examples, a whole one the examples of as many first steps. With a batch
    that never grows it is the usual schedule.

    Raises:
        RecipeError: if the schedule is none that a step's number decides.
    """
    seen = schedule.seen(steps)
    warmup = arguments.get_warmup_steps(seen[-1])
    if arguments.warmup_steps >= 1:
        warmup = seen[min(warmup, steps)]
    settings: Any = arguments.lr_scheduler_kwargs  # a dict by now, whatever was given
    # With the same rate: what it shall end at may be given in absolute terms.
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optimizer.defaults["lr"])
    by_examples = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=warmup,
        num_training_steps=seen[-1],
        scheduler_specific_kwargs=settings,
    )
    if not isinstance(by_examples, LambdaLR):
        name = SchedulerType(arguments.lr_scheduler_type).value
        raise RecipeError(
            f"lr_scheduler_type is {name}, which looks at more than how far the run is, and cannot follow a batch that "
            "doubles. Take constant, linear or cosine, with a warm-up if wanted, or a constant batch."
        )
    (rate,) = by_examples.lr_lambdas
    return LambdaLR(optimizer, lambda step: float(rate(seen[min(step, steps)])))
