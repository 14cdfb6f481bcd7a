"""The CPU in the role of the device, for tests and dry runs: copies are real, their order is enforced, bytes are counted.

A copy runs only when something waits for it, which is as late as a stream may be. Until then, and after it was given up, memory
of the device holds 0xFF: NaN as float32, bfloat16 and float16, which the scales of weights on a grid are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

POISON = 0xFF


class Moment:
    """When a copy, or what was computed before, is done.

    Args:
        queue: the copies that run up to it; None if it has already come.
    """

    def __init__(self, queue: Queue | None = None) -> None:
        self.queue = queue

    @property
    def has_come(self) -> bool:
        """Whether it has come."""
        return self.queue is None


class Queue:
    """A stand-in for a stream: copies run in order, and only when one of them is waited for."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Moment, list[Moment], Callable[[], None]]] = deque()

    def add(self, after: Iterable[Moment], run: Callable[[], None]) -> Moment:
        """Append work that may run once all of `after` has come."""
        moment = Moment(self)
        self._waiting.append((moment, list(after), run))
        return moment

    def run_to(self, moment: Moment) -> None:
        """Run the work up to a moment, and what it waits for in other queues."""
        while not moment.has_come:
            done, after, run = self._waiting.popleft()
            for earlier in after:
                if earlier.queue is not None:
                    earlier.queue.run_to(earlier)
            run()
            done.queue = None

    def run_all(self) -> None:
        """Run everything."""
        while self._waiting:
            self.run_to(self._waiting[-1][0])


class StandIn:
    """A link to a second arena in the host's memory.

    Args:
        eager: run copies at once, which is as early as a stream may be.

    Attributes:
        device_bytes: of the device's memory that was asked for.
        host_bytes: of the host's.
        copied_in: bytes copied to the device.
        copied_out: bytes copied back.
    """

    device = torch.device("cpu")

    def __init__(self, *, eager: bool = False) -> None:
        self._eager = eager
        self._in, self._out = Queue(), Queue()
        self.device_bytes = self.host_bytes = self.copied_in = self.copied_out = 0

    def host_memory(self, size_bytes: int) -> Tensor:
        """Ordinary memory."""
        self.host_bytes += size_bytes
        return torch.empty(size_bytes, dtype=torch.uint8)

    def free_host_memory(self, memory: Tensor) -> None:
        """Count it no longer."""
        self.host_bytes -= memory.nbytes

    def device_memory(self, size_bytes: int) -> Tensor:
        """Ordinary memory, poisoned until something is copied to it."""
        self.device_bytes += size_bytes
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def mark(self) -> Moment:
        """What the CPU has begun is done."""
        return Moment()

    def release(self, memory: Tensor) -> Moment:
        """Poisoned once what was to be copied out of it has been."""
        return self._add(self._out, (), lambda: _bytes(memory).fill_(POISON))

    def copy_in(self, target: Tensor, source: Tensor, after: Iterable[Moment]) -> Moment:
        """The target keeps its poison until something waits for the copy."""
        self.copied_in += source.nbytes
        return self._copy(self._in, target, source, after)

    def copy_out(self, target: Tensor, source: Tensor, after: Iterable[Moment]) -> Moment:
        """Into the host's memory."""
        self.copied_out += source.nbytes
        return self._copy(self._out, target, source, after)

    def _copy(self, queue: Queue, target: Tensor, source: Tensor, after: Iterable[Moment]) -> Moment:
        return self._add(queue, after, lambda: target.copy_(source))

    def _add(self, queue: Queue, after: Iterable[Moment], work: Callable[[], object]) -> Moment:
        def run() -> None:
            with torch.no_grad():
                work()

        moment = queue.add(after, run)
        if self._eager:
            queue.run_to(moment)
        return moment

    def wait(self, event: Moment) -> None:
        """Run what leads up to it."""
        self._run_to(event)

    def finish(self, event: Moment) -> None:
        """Run what leads up to it."""
        self._run_to(event)

    def _run_to(self, event: Moment) -> None:
        if event.queue is not None:
            event.queue.run_to(event)

    def close(self) -> None:
        """Run everything."""
        self._out.run_all()
        self._in.run_all()


def _bytes(memory: Tensor) -> Tensor:
    return memory if memory.dtype == torch.uint8 else memory.view(torch.uint8)
