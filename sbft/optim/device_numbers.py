"""The numbers that change from step to step, in device memory, where updates in a CUDA graph read them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sbft.rounding import noise_keys


class DeviceNumbers:
    """Learning rates, weights of averages and noise keys of one step in one tensor.

    Args:
        groups: number of parameter groups.
        averages: number of moving averages per group.
        parameters: number of parameters.
        device: where updates run.

    Attributes:
        rates: learning rate of each group, float64 of shape (): as exact as Python's, whatever it is multiplied by.
        weights: weights of each group's averages, likewise.
    """

    def __init__(self, groups: int, averages: int, parameters: int, device: torch.device) -> None:
        count = groups * (1 + averages)
        self._words = torch.zeros(2 * count + 2 * parameters, dtype=torch.int32, device=device)
        by_group = self._words[: 2 * count].view(torch.float64).view(groups, 1 + averages)
        self.rates: tuple[Tensor, ...] = by_group[:, 0].unbind()
        self.weights: tuple[tuple[Tensor, ...], ...] = tuple(row.unbind() for row in by_group[:, 1:].unbind())
        self._keys = self._words[2 * count :].view(parameters, 2)

    def key(self, parameter: int) -> tuple[Tensor, Tensor]:
        """Noise key of the parameter in this position: two words, int32 of shape ()."""
        return self._keys[parameter, 0], self._keys[parameter, 1]

    def write(self, by_group: list[list[float]], seed: int, step: int) -> None:
        """Send the numbers of a step to the device, in stream order; the host does not wait.

        Args:
            by_group: for each group its learning rate, then the weights of its averages.
            seed: seed of the noise.
            step: number of finished steps.
        """
        keys = noise_keys(seed, step, len(self._keys))
        numbers = np.array(by_group, dtype=np.float64).ravel()
        words = torch.from_numpy(np.concatenate((numbers.view(np.int32), keys.ravel())))
        if self._words.is_cuda:
            words = words.pin_memory()  # torch does not reuse this memory before the copy has read it
        self._words.copy_(words, non_blocking=True)
