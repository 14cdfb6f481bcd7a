"""A link that raises if a GPU would compute with bytes that are not there yet, or no longer: it checks all waits.

Arithmetic is observed operation by operation. Compiled updates bypass torch, and are noted by `updates_noted`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbft.grid.tensor import GridTensor
from sbft.optim.base import TokenOptimizer
from sbft.training.offload.stand_in import Moment, StandIn


class RaceError(AssertionError):
    """On a GPU, the order of two accesses to memory would be left to chance."""


class _Mark(Moment):
    def __init__(self, clock: int, queue: Any = None) -> None:
        super().__init__(queue)
        self.clock = clock


@dataclass(eq=False)
class _Memory:
    tensor: Tensor
    is_device: bool
    last_use: int = 0
    """When the arithmetic last used it, on its clock."""
    arriving: Moment | None = None
    is_there: bool = False
    leaving: list[Moment] = field(default_factory=list)
    """Copies out of it, or into it if it is host memory, that the other side has not waited for."""
    read_by: list[Moment] = field(default_factory=list)
    """For host memory: copies to the device that the arithmetic has not waited for."""

    def holds(self, address: int) -> bool:
        return self.tensor.data_ptr() <= address < self.tensor.data_ptr() + self.tensor.nbytes


class WatchedLink(StandIn):
    """A `StandIn` that checks the order of all accesses to its memory."""

    def __init__(self, *, eager: bool = False) -> None:
        super().__init__(eager=eager)
        self.memories: list[_Memory] = []
        self.clock = 0
        self._order: list[Moment] = []  # of copies out
        self.copying = False
        self.computes: Callable[[], bool] = lambda: False
        """Whether the device's arithmetic is running now, and not code of the host."""

    def host_memory(self, size_bytes: int) -> Tensor:
        return self._watch(super().host_memory(size_bytes), False)

    def device_memory(self, size_bytes: int) -> Tensor:
        return self._watch(super().device_memory(size_bytes), True)

    def _watch(self, tensor: Tensor, is_device: bool) -> Tensor:
        self.memories.append(_Memory(tensor, is_device))
        return tensor

    def memory_of(self, tensor: Tensor) -> _Memory | None:
        address = tensor.data_ptr() if tensor.numel() and tensor.layout == torch.strided else 0
        return next((memory for memory in self.memories if memory.holds(address)), None)

    def touch(self, tensor: Tensor, what: str) -> None:
        """Check an access to a tensor by the arithmetic or by code of the host."""
        if isinstance(tensor, GridTensor):
            for part in tensor.quantized.tensors.values():
                self.touch(part, what)
            return
        memory = self.memory_of(tensor)
        if memory is None:
            return
        if memory.is_device:
            if not memory.is_there:
                raise RaceError(
                    f"{what} uses memory of the device before what it is to hold has arrived, or after it left"
                )
            self.clock += 1
            memory.last_use = self.clock
        elif self.computes():
            raise RaceError(f"{what} computes with a weight that is in the host's memory")
        elif memory.leaving:
            raise RaceError(f"{what} reads the host's memory while a layer is being written back to it")

    def mark(self) -> Moment:
        return _Mark(self.clock)

    def release(self, memory: Tensor) -> Moment:
        found = self.memory_of(memory)
        assert found is not None
        found.is_there = False
        moment: Any = super().release(memory)
        moment.clock = self.clock
        return moment

    def copy_in(self, target: Tensor, source: Tensor, after: Iterable[Moment]) -> Moment:
        after = list(after)
        # A layer's input is copied to memory of its own.
        there, here = self.memory_of(target) or _Memory(target, True), self.memory_of(source)
        assert here is not None
        self._check_after_arithmetic(there, after, "is copied over")
        if not set(there.leaving) <= set(after):
            raise RaceError("a layer is copied over another that is still being written back")
        if here.leaving and here.leaving[-1] not in after:
            raise RaceError("a layer is brought back before it has arrived in the host's memory")
        moment = super().copy_in(target, source, after)
        there.arriving, there.is_there, there.leaving, there.last_use = moment, False, [], 0
        here.read_by.append(moment)
        if there not in self.memories:
            self.memories.insert(0, there)
        return moment

    def copy_out(self, target: Tensor, source: Tensor, after: Iterable[Moment]) -> Moment:
        after = list(after)
        there, here = self.memory_of(source) or _Memory(source, True, is_there=True), self.memory_of(target)
        assert here is not None
        self._check_after_arithmetic(there, after, "is written back")
        if not there.is_there:
            raise RaceError("a layer is written back that has not arrived")
        if not set(here.read_by) <= set(after):
            raise RaceError("the host's memory is written to while a copy to the device may read it")
        moment = super().copy_out(target, source, after)
        self._order.append(moment)
        there.leaving.append(moment)
        here.leaving.append(moment)
        return moment

    def _check_after_arithmetic(self, memory: _Memory, after: list[Moment], what: str) -> None:
        marks = [vars(moment).get("clock", 0) for moment in after]
        if memory.last_use > max(marks, default=0):
            raise RaceError(f"a layer {what} while arithmetic may still use it")

    def wait(self, event: Moment) -> None:
        super().wait(event)
        for memory in self.memories:
            if memory.arriving is event:
                memory.is_there = True
            memory.read_by = [moment for moment in memory.read_by if moment is not event]

    def finish(self, event: Moment) -> None:
        super().finish(event)
        if event in self._order:
            done = set(self._order[: self._order.index(event) + 1])
            for memory in self.memories:
                memory.leaving = [moment for moment in memory.leaving if moment not in done]

    def _add(self, queue: Any, after: Iterable[Moment], work: Any) -> Moment:
        def unwatched() -> None:
            self.copying = True
            try:
                work()
            finally:
                self.copying = False

        return super()._add(queue, after, unwatched)


class Watch(TorchDispatchMode):
    """Tells the link what every operation of torch reads or writes."""

    def __init__(self, link: WatchedLink) -> None:
        super().__init__()
        self.link = link

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.link.copying and not func.is_view:
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor):
                    self.link.touch(leaf, func.name())
        return func(*args, **(kwargs or {}))


def updates_noted(patch: pytest.MonkeyPatch, link: WatchedLink) -> None:
    """Tell the link what compiled code updates."""
    update = TokenOptimizer._update_parameter

    def noted(self: TokenOptimizer, param: Tensor, may_wait: bool = False) -> None:
        link.touch(param, "an update")
        update(self, param, may_wait)
        link.touch(param, "an update")

    patch.setattr(TokenOptimizer, "_update_parameter", noted)


def run_watched(link: WatchedLink, patch: pytest.MonkeyPatch, call: Any) -> Any:
    """Make a call while every access is watched."""
    updates_noted(patch, link)
    with Watch(link), torch.autograd.set_multithreading_enabled(False):
        return call()
