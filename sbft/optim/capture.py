"""Updates within a CUDA graph: what changes from step to step lies in the device's memory, where a replay reads it.

A captured launch keeps the numbers it was made with. Learning rates, weights of moving averages (which go by a step's tokens)
and the keys of the rounding noise are other ones in every step, so while updates are captured the kernels are given addresses
in their place. All else has to stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sbft.optim.sharding import is_sharded
from sbft.rounding import noise_keys

if TYPE_CHECKING:
    from sbft.optim.base import TokenOptimizer


class DeviceNumbers:
    """Learning rates, weights of averages and noise keys of one step in one tensor.

    Args:
        groups: how many parameter groups there are.
        averages: how many moving averages a group has.
        parameters: how many parameters.
        device: where updates run.

    Attributes:
        rates: float64 of shape () of each group, as exact as Python's, whatever they are multiplied with.
        weights: likewise of each group's averages.
    """

    def __init__(self, groups: int, averages: int, parameters: int, device: torch.device) -> None:
        numbers = groups * (1 + averages)
        self._words = torch.zeros(2 * numbers + 2 * parameters, dtype=torch.int32, device=device)
        by_group = self._words[: 2 * numbers].view(torch.float64).view(groups, 1 + averages)
        self.rates: tuple[Tensor, ...] = by_group[:, 0].unbind()
        self.weights: tuple[tuple[Tensor, ...], ...] = tuple(row.unbind() for row in by_group[:, 1:].unbind())
        self._keys = self._words[2 * numbers :].view(parameters, 2)

    def key(self, parameter: int) -> tuple[Tensor, Tensor]:
        """Noise key of the parameter in this position, two of int32 and shape ()."""
        return self._keys[parameter, 0], self._keys[parameter, 1]

    def write(self, by_group: list[list[float]], seed: int, step: int) -> None:
        """Send the numbers of a step, behind what was launched before; the host waits for none of it.

        Args:
            by_group: of each group its rate, and the weights of its averages.
            seed: of the noise.
            step: how many steps are finished.
        """
        keys = noise_keys(seed, step, len(self._keys))
        numbers = np.array(by_group, dtype=np.float64).ravel()
        words = torch.from_numpy(np.concatenate((numbers.view(np.int32), keys.ravel())))
        if self._words.is_cuda:
            words = words.pin_memory()  # torch gives this memory to nobody else before the copy has read it
        self._words.copy_(words, non_blocking=True)


class CapturedUpdates:
    """The updates of released gradients as CUDA graphs hold them.

    Run a few steps `within()` first, then capture one there; it must come to its end, which `after_capture()` notes. A
    captured step does not run: replay it as any later one, `before_replay()`, the graph, and `after_replay()` of what
    `after_capture()` returned. Any number of steps may be captured, such as of batches of several shapes.

    Args:
        optimizer: it releases its gradients, on one CUDA device.

    Raises:
        ValueError: if the optimizer cannot be captured; the message says why.
    """

    def __init__(self, optimizer: TokenOptimizer) -> None:
        if not optimizer.releases_gradients:
            raise ValueError("updates can be captured where gradients are released: call release_gradients() first")
        self._optimizer = optimizer
        self._make_numbers()

    def _make_numbers(self) -> None:
        """For the groups and parameters that there are now."""
        optimizer = self._optimizer
        parameters = [param for group in optimizer.param_groups for param in group["params"]]
        devices = {param.device for param in parameters}
        if len(devices) > 1 or any(map(is_sharded, parameters)):
            raise ValueError("updates can be captured where all parameters lie whole on one device")
        if any(map(optimizer._follows_steps, optimizer.param_groups)):
            raise ValueError("schedule='power' averages otherwise in every step, which a captured update cannot")
        self._parameters = parameters
        groups, averages = len(optimizer.param_groups), len(optimizer.averages)
        self._numbers = DeviceNumbers(groups, averages, len(parameters), devices.pop())
        self._numbers_made_for = optimizer._changes

    @contextmanager
    def within(self) -> Iterator[None]:
        """Updates in here read their numbers from the device."""
        optimizer = self._optimizer
        if self._numbers_made_for != optimizer._changes:  # a group was added
            self._make_numbers()
        self.before_replay()
        optimizer._numbers, optimizer._captured = self._numbers, True
        try:
            yield
        finally:
            optimizer._numbers = None

    def after_capture(self) -> CapturedStep:
        """The step that is open was captured: what it left on the host is taken back, since it did not run."""
        optimizer = self._optimizer
        kept = [(param, param.grad) for param in self._parameters if param.grad is not None]
        captured = CapturedStep(optimizer, set(optimizer._updated), list(optimizer._square_sums), kept)
        optimizer._updated.clear()
        optimizer._square_sums.clear()
        return captured

    def before_replay(self) -> None:
        """Send the coming step's numbers, at any time between the last update and its own."""
        optimizer = self._optimizer
        by_group = [
            [float(group["lr"]), *(optimizer._average_weight(group, average) for average in optimizer.averages)]
            for group in optimizer.param_groups
        ]
        self._numbers.write(by_group, optimizer.seed, optimizer.clock.steps)

    def circumstances(self) -> object:
        """What has to be the same for a replay to do what the coming step asks for: settings, tensors and weights."""
        optimizer = self._optimizer
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "clock")}
            for group in optimizer.param_groups
        ]
        weights = [(param.data_ptr(), param._version, param.requires_grad) for param in self._parameters]
        return optimizer._changes, settings, weights


class CapturedStep:
    """What the updates of one captured step leave on the host."""

    def __init__(
        self,
        optimizer: TokenOptimizer,
        updated: set[Tensor],
        square_sums: list[float | Tensor],
        kept: list[tuple[Tensor, Tensor]],
    ) -> None:
        self._optimizer = optimizer
        self._updated, self._square_sums = updated, square_sums
        self._kept = kept  # parameters left to step(), and their gradients

    def after_replay(self) -> None:
        """Leave the optimizer as the updates would have: `step()` is next."""
        self._optimizer._updated.update(self._updated)
        self._optimizer._square_sums.extend(self._square_sums)
        for param, grad in self._kept:  # has been set to None since
            param.grad = grad
