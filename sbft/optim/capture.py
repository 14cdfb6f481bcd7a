"""Updates within a CUDA graph: what changes from step to step lies in the device's memory, where a replay reads it.

A captured launch keeps the numbers it was made with. The learning rate and the keys of the rounding noise are other ones in
every step, so while updates are captured the kernels are given addresses in their place. All else stays the same as
long as every step has equally many tokens.
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
    """Learning rates and noise keys of one step in one tensor.

    Args:
        groups: how many parameter groups there are.
        parameters: how many parameters.
        device: where updates run.

    Attributes:
        rates: float64 of shape () of each group, as exact as Python's, whatever they are multiplied with.
    """

    def __init__(self, groups: int, parameters: int, device: torch.device) -> None:
        self._words = torch.zeros(2 * groups + 2 * parameters, dtype=torch.int32, device=device)
        self.rates: tuple[Tensor, ...] = self._words[: 2 * groups].view(torch.float64).unbind()
        self._keys = self._words[2 * groups :].view(parameters, 2)

    def key(self, parameter: int) -> tuple[Tensor, Tensor]:
        """Noise key of the parameter in this position, two of int32 and shape ()."""
        return self._keys[parameter, 0], self._keys[parameter, 1]

    def write(self, rates: list[float], seed: int, step: int) -> None:
        """Send the numbers of a step, behind what was launched before; the host waits for none of it."""
        keys = noise_keys(seed, step, len(self._keys))
        words = torch.from_numpy(np.concatenate((np.array(rates, dtype=np.float64).view(np.int32), keys.ravel())))
        if self._words.is_cuda:
            words = words.pin_memory()  # torch gives this memory to nobody else before the copy has read it
        self._words.copy_(words, non_blocking=True)


class CapturedUpdates:
    """The updates of released gradients as a CUDA graph holds them.

    Run a few steps `within()` first, then capture one there; it must come to its end, which `after_capture()` notes. A
    captured step does not run: replay it as any later one, `before_replay()`, the graph, `after_replay()`.

    Args:
        optimizer: it releases its gradients, on one CUDA device.

    Raises:
        ValueError: if the optimizer cannot be captured; the message says why.
    """

    def __init__(self, optimizer: TokenOptimizer) -> None:
        if not optimizer.releases_gradients:
            raise ValueError("updates can be captured where gradients are released: call release_gradients() first")
        self._optimizer = optimizer
        self._made_for: object = None
        self._updated: set[Tensor] = set()
        self._square_sums: list[float | Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []  # parameters left to step(), and their gradients
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
        self._numbers = DeviceNumbers(len(optimizer.param_groups), len(parameters), devices.pop())
        self._numbers_made_for = optimizer._changes

    @contextmanager
    def within(self) -> Iterator[None]:
        """Updates in here read their numbers from the device."""
        optimizer = self._optimizer
        if self._numbers_made_for != optimizer._changes:  # a group was added
            self._make_numbers()
        self._write()
        optimizer._numbers, optimizer._captured = self._numbers, True
        try:
            yield
        finally:
            optimizer._numbers = None

    def after_capture(self) -> None:
        """The step that is open was captured: remember what it left on the host, and take it back, since it did not run."""
        optimizer = self._optimizer
        self._updated, self._square_sums = set(optimizer._updated), list(optimizer._square_sums)
        self._kept = [(param, param.grad) for param in self._parameters if param.grad is not None]
        self._made_for = self._circumstances()
        optimizer._updated.clear()
        optimizer._square_sums.clear()

    @property
    def hold(self) -> bool:
        """Whether a replay would do what the coming step asks for: as many tokens, the same settings, tensors and weights."""
        return self._made_for == self._circumstances()

    def before_replay(self) -> None:
        """Send the coming step's numbers, at any time between the last update and its own."""
        self._write()

    def after_replay(self) -> None:
        """Leave the optimizer as the updates would have: `step()` is next."""
        self._optimizer._updated.update(self._updated)
        self._optimizer._square_sums.extend(self._square_sums)
        for param, grad in self._kept:  # has been set to None since
            param.grad = grad

    def _write(self) -> None:
        optimizer = self._optimizer
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._numbers.write(rates, optimizer.seed, optimizer.clock.steps)

    def _circumstances(self) -> object:
        optimizer = self._optimizer
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        weights = [(param.data_ptr(), param._version, param.requires_grad) for param in self._parameters]
        return optimizer.tokens_per_step, optimizer._changes, settings, weights
