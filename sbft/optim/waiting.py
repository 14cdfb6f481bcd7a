"""Released gradients that wait for each other, so that the updates of many small weights share their launches on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sbft.native.memory import stored_tensors
from sbft.optim.kernels import can_wait, waiting_updates

SMALLEST_LIMIT, WEIGHTS_SHARE = 4 << 20, 0.01
"""What may wait on a device: this number of bytes, or this share of the weights if that is more. The peak rises by 1% then."""


class WaitingReleases:
    """The updates of one optimizer that wait, on all devices.

    Attributes:
        most_bytes: limit of the gradients that wait on a device, with the memory that their launch takes; None for the usual.
    """

    def __init__(self) -> None:
        self.most_bytes: int | None = None
        self._by_device: dict[torch.device, Any] = {}

    def __bool__(self) -> bool:
        """Whether updates wait."""
        return any([waiting.waiting_bytes for waiting in self._by_device.values()])

    def instead_of(self, kernels: ModuleType, device: torch.device, params: Iterable[Tensor]) -> Any:
        """What has the functions of a backend and lets small updates wait; the backend itself, if it has no such.

        Args:
            kernels: what `kernels.backend_for` returned.
            device: of the weight.
            params: all parameters of the optimizer.
        """
        if not can_wait(kernels):
            return kernels
        if device not in self._by_device:
            most = limit_for(params, device) if self.most_bytes is None else self.most_bytes
            self._by_device[device] = waiting_updates(device, most)
        return self._by_device[device]

    def launch(self) -> None:
        """Launch all updates that wait."""
        for waiting in self._by_device.values():
            waiting.launch()

    def forget(self) -> None:
        """Launch all, and forget what is known of the weights."""
        self.launch()
        self._by_device.clear()


def limit_for(params: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that may wait on a device with these weights."""
    weights_bytes = sum(tensor.nbytes for p in params if p.device == device for tensor in stored_tensors(p))
    return max(SMALLEST_LIMIT, int(WEIGHTS_SHARE * weights_bytes))
