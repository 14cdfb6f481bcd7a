"""Updates within a CUDA graph.

A captured launch keeps the numbers that it was made with. Learning rates, weights of moving averages (which depend on a step's
tokens) and the keys of the rounding noise change in every step. While updates are captured the kernels are therefore given
addresses in `DeviceNumbers` instead. All else has to stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sbft.optim.base import TokenOptimizer
from sbft.optim.device_numbers import DeviceNumbers
from sbft.optim.kernels.blocks import version_of
from sbft.optim.sharding import is_sharded
from sbft.optim.update import OpenStep


class CapturedUpdates:
    """The updates of released gradients as CUDA graphs hold them.

    Run a few steps `within()` first, then capture one there and end it with `after_capture()`. A captured step does not run:
    replay it like any later one, with `before_replay()`, the graph, and `after_replay()` of what `after_capture()` returned.
    Any number of steps may be captured, for example one per shape of batch.

    Args:
        optimizer: releases its gradients, on one CUDA device.

    Raises:
        ValueError: if the optimizer cannot be captured; the message says why.
    """

    def __init__(self, optimizer: TokenOptimizer) -> None:
        if not optimizer.releases_gradients:
            raise ValueError("updates can be captured only if gradients are released: call release_gradients() first")
        self._optimizer = optimizer
        self._make_numbers()

    def _make_numbers(self) -> None:
        """Allocate numbers for the groups and parameters that the optimizer has now."""
        optimizer = self._optimizer
        parameters = [param for group in optimizer.param_groups for param in group["params"]]
        devices = {param.device for param in parameters}
        if len(devices) > 1 or any(map(is_sharded, parameters)):
            raise ValueError("updates can be captured only if all parameters are whole and on one device")
        if any(map(optimizer.varies_by_step, optimizer.param_groups)):
            raise ValueError("schedule='power' changes the average in every step, which a captured update cannot do")
        self._parameters = parameters
        groups, averages = len(optimizer.param_groups), len(optimizer.averages)
        self._numbers = DeviceNumbers(groups, averages, len(parameters), devices.pop())
        self._numbers_made_for = optimizer.replacements

    @contextmanager
    def within(self) -> Iterator[None]:
        """Updates in here read their numbers from the device."""
        if self._numbers_made_for != self._optimizer.replacements:  # a group was added
            self._make_numbers()
        self.before_replay()
        self._optimizer.launch_waiting()
        with self._optimizer.reading_numbers_from(self._numbers):
            yield

    def after_capture(self) -> CapturedStep:
        """Note what the captured step left on the host, and undo it there, since the step did not run."""
        kept = [(param, param.grad) for param in self._parameters if param.grad is not None]
        return CapturedStep(self._optimizer, self._optimizer.take_open_step(), kept)

    def before_replay(self) -> None:
        """Send the coming step's numbers, at any time between the last update and its own."""
        optimizer = self._optimizer
        self._numbers.write(optimizer.numbers_of_step(), optimizer.seed, optimizer.clock.steps)

    def circumstances(self) -> object:
        """Settings, tensors and weights: a replay is the coming step only if these are as they were at the capture."""
        optimizer = self._optimizer
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "clock")}
            for group in optimizer.param_groups
        ]
        weights = [(*version_of(param), param.requires_grad) for param in self._parameters]
        return optimizer.replacements, settings, weights


class CapturedStep:
    """What the updates of one captured step leave on the host; made by `CapturedUpdates.after_capture()`.

    Args:
        optimizer: whose step was captured.
        open_step: the updates of the step.
        kept: parameters that are left to `step()`, with their gradients.
    """

    def __init__(self, optimizer: TokenOptimizer, open_step: OpenStep, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._optimizer = optimizer
        self._open_step = open_step
        self._kept = kept

    def after_replay(self) -> None:
        """Leave the optimizer as the updates would have: `step()` is next."""
        self._optimizer.add_to_open_step(self._open_step)
        for param, grad in self._kept:  # has been set to None since
            param.grad = grad
