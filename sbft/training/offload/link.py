"""The link between the host's memory and the device: memory on both sides, and copies that run beside the arithmetic.

Whoever uses a link says what each copy has to wait for. `CudaLink` has a stream for either direction. `StandIn`
(`sbft.training.offload.stand_in`) has the CPU play the device, and refuses what a GPU would get wrong in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from sbft.errors import TrainingError

Event = Any
"""A moment in the work of the device. A link makes it, and its own methods take it."""


class OffloadError(TrainingError):
    """Layers cannot be kept in the host's memory here."""


class Link(Protocol):
    """Memory on both sides, and copies between them."""

    device: torch.device

    def host_memory(self, size_bytes: int) -> Tensor:
        """Memory of the host that the device can copy from and to by itself: uint8 (size_bytes,).

        Raises:
            OffloadError: if there is none.
        """

    def free_host_memory(self, memory: Tensor) -> None:
        """Give up what `host_memory` returned, and nothing copies to or from any more."""

    def device_memory(self, size_bytes: int) -> Tensor:
        """Memory of the device: uint8 (size_bytes,)."""

    def mark(self) -> Event:
        """The moment when the device's arithmetic that was begun up to now is done."""

    def release(self, memory: Tensor) -> Event:
        """Say that no arithmetic that begins from now on reads a piece of device memory; the moment when none does."""

    def copy_in(self, target: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """Begin a copy to the device once all of `after` has come; returns the moment when it is done.

        Copies in this direction run one after the other.
        """

    def copy_out(self, target: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """The same in the other direction."""

    def wait(self, event: Event) -> None:
        """Have the device's arithmetic from now on wait for a moment."""

    def finish(self, event: Event) -> None:
        """Wait here until a moment has come."""

    def close(self) -> None:
        """Wait for everything, and give up the host's memory."""


class CudaLink:
    """The link to a GPU: pinned memory, and a stream in either direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []

    def host_memory(self, size_bytes: int) -> Tensor:
        """Pinned memory. torch's own allocator of such memory would round the size up to a power of two."""
        memory = torch.empty(size_bytes, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size_bytes, 0) if size_bytes else 0
        if int(code) != 0:
            raise OffloadError(
                f"The driver pins no {size_bytes:,} bytes of the host's memory (CUDA error {int(code)}), which copies beside "
                "the arithmetic require. Raise the limit on locked memory (ulimit -l unlimited; docker run --ulimit "
                "memlock=-1), stream fewer layers (offload: {layers: N}), or leave offload out."
            )
        self._pinned.append(memory)
        return memory

    def free_host_memory(self, memory: Tensor) -> None:
        """It is no longer pinned."""
        self._pinned = [other for other in self._pinned if other is not memory]
        _unpin(memory)

    def device_memory(self, size_bytes: int) -> Tensor:
        """From torch's caching allocator."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Event:
        """An event on the current stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def release(self, memory: Tensor) -> Event:
        """The same as `mark`: the current stream runs in order."""
        return self.mark()

    def copy_in(self, target: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """On a stream of its own."""
        return self._copy(self._in, target, source, after)

    def copy_out(self, target: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        """On a stream of its own."""
        return self._copy(self._out, target, source, after)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor, after: Iterable[Event]) -> Event:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        # The allocator must not hand out the device's side again before the copy is done.
        (target if target.is_cuda else source).record_stream(stream)
        return stream.record_event()

    def wait(self, event: Event) -> None:
        """On the current stream."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: Event) -> None:
        """Block this thread."""
        event.synchronize()

    def close(self) -> None:
        """Copies are done, and the memory is no longer pinned; it belongs to the weights that are in it."""
        self._in.synchronize()
        self._out.synchronize()
        for memory in self._pinned:
            _unpin(memory)
        self._pinned.clear()


def _unpin(memory: Tensor) -> None:
    if memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def link_to(device: torch.device) -> Link:
    """The link to a device.

    Raises:
        OffloadError: if it is no GPU, or no memory can be pinned.
    """
    if device.type != "cuda":
        raise OffloadError(
            f"offload streams layers between the host's memory and a GPU, and this run's device is {device.type}, which "
            "computes in the host's memory. Leave offload out."
        )
    link = CudaLink(device)
    link.host_memory(1 << 20)
    link.close()
    return link
