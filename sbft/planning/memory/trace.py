"""Traces what torch code allocates and frees by running it on the meta device, where nothing is really allocated."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sbft.grid.tensor import GridTensor
from sbft.native.memory import stored_tensors
from sbft.native.memory_pool import pool_available
from sbft.planning.memory.cached_operations import recalled
from sbft.planning.memory.heap import Heap, PooledHeap

Phase = tuple[str, int | None]
"""A part of a training step: its name, and the layer's number where each layer has one."""

BUILD: Phase = ("build", None)
_BLOCKS = {"cuda": 512, "cpu": 64}
"""Torch's allocators round a request up to a multiple of this, in bytes."""
_aten = torch.ops.aten
_FIRST_FACTOR = {
    **dict.fromkeys((_aten.mm.default, _aten.mm.out, _aten.bmm.default), 0),
    **dict.fromkeys((_aten.addmm.default, _aten.baddbmm.default), 1),
}
"""Position of the first factor among the arguments of each matrix product; the second factor follows."""


class _Event(NamedTuple):
    storage: int
    size: int
    """Bytes allocated; negative where they are freed."""
    phase: Phase


class _Recording(NamedTuple):
    events: list[tuple[int, int]]
    """Storages, numbered from 0, and their bytes, negative where they are freed."""
    storages: int
    products: list[Hashable]


_recordings: dict[Hashable, _Recording] = {}


class AllocationTrace(TorchDispatchMode):
    """A mode that records the storage of every tensor allocated in it; meant for meta tensors.

    A meta tensor holds no numbers. Code that asks for one (`tensor.item()`, `bool(tensor)`) receives `answer`.

    Args:
        device: type of device that the tensors stand for.

    Attributes:
        phase: the part of the step that is running; set by the caller.
        products: on a CPU, each shape of bfloat16 matrix products so far, with the name of the phase that had it first.
        answer: the number that such code receives.
        heap: on a CPU, the simulated heap; it holds what was allocated after the phase "build".
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.phase: Phase = BUILD
        self.products: dict[Hashable, str] = {}
        self.answer: float = 0
        self.heap: Heap | PooledHeap | None = None
        if device == "cpu":
            self.heap = PooledHeap() if pool_available() else Heap()
        self._device = device
        self._block = _BLOCKS.get(device, 64)
        self._events: list[_Event] = []
        self._live: dict[int, tuple[int, int]] = {}  # storage number and bytes, by address
        self._kinds: dict[int, str] = {}
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps `__torch_dispatch__` to keep torch.compile out of it. Nothing is compiled here, and the
        # wrapper would slow down every operation.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        if any(issubclass(kind, GridTensor) for kind in types):
            return NotImplemented  # torch then calls GridTensor's own dispatch, which comes back here with its parts
        if function is _aten._local_scalar_dense.default:
            return self.answer
        grouped = function is _aten._grouped_mm.default
        if self.heap is not None:  # products only matter on a CPU
            if function in _FIRST_FACTOR:
                first = _FIRST_FACTOR[function]
                self._note_product(*args[first : first + 2])
            elif grouped:
                self._note_grouped_product(*args[:2])
        # On the meta device, torch's _grouped_mm accepts bfloat16 alone; its kernels accept more.
        run = _grouped_product if grouped else recalled(function)
        result = run(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._record(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._record(item)
        return result

    def replay(self, key: Hashable, code: Callable[[], object]) -> None:
        """Run code, or repeat what it allocated and freed when it first ran under this key, in this trace or another.

        Args:
            key: everything that the allocations depend on; the type of device is added.
            code: must free nothing that was allocated before it. What it leaves allocated stays until the trace ends.
        """
        key = (self._device, key)
        recording = _recordings.get(key)
        if recording is None:
            begin, first, known = len(self._events), self._count, self.products
            self.products = {}
            code()
            events = [(event.storage - first, event.size) for event in self._events[begin:]]
            assert all(number >= 0 for number, _ in events), "the code freed memory that was allocated before it"
            _recordings[key] = _Recording(events, self._count - first, list(self.products))
            self.products = {**self.products, **known}
            return
        for number, size in recording.events:
            self._events.append(_Event(self._count + number, size, self.phase))
            if self.heap is not None and size > 0:
                self.heap.allocate(self._count + number, size)
            elif self.heap is not None:
                self.heap.free(self._count + number)
        self._count += recording.storages
        for product in recording.products:
            self.products.setdefault(product, self.phase[0])

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Label the storages of these tensors for their whole life; the last label counts."""
        for tensor in tensors:
            for stored in stored_tensors(tensor):
                self._kinds[self._record(stored)] = kind

    def label_unknown(self, kind: str, *, since: int = 0) -> None:
        """Label all live storages without a label, except the first `since` that were ever allocated."""
        for number, _ in self._live.values():
            if number >= since:
                self._kinds.setdefault(number, kind)

    def label_born_in(self, phase: Phase, kind: str) -> None:
        """Label all storages without a label that were allocated in a phase."""
        for event in self._events:
            if event.phase == phase and event.size > 0:
                self._kinds.setdefault(event.storage, kind)

    @property
    def count(self) -> int:
        """Storages so far."""
        return self._count

    @property
    def events(self) -> int:
        """Allocations and frees so far."""
        return len(self._events)

    def peaks(self, since: int = 0) -> dict[Phase, Counter[str]]:
        """The bytes of each kind at each phase's peak. What was never labelled is "workspace".

        Args:
            since: number of the first event to consider. What earlier events left allocated counts.
        """
        held: Counter[str] = Counter()
        highest: dict[Phase, int] = {}
        peaks: dict[Phase, Counter[str]] = {}
        phase: Phase | None = None
        for event in self._events[:since]:
            held[self._kinds.get(event.storage, "workspace")] += event.size
        total = sum(held.values())
        for event in self._events[since:]:
            if event.phase != phase:  # what is allocated when a phase starts counts for it
                phase = event.phase
                if total > highest.get(phase, -1):
                    highest[phase], peaks[phase] = total, held.copy()
            held[self._kinds.get(event.storage, "workspace")] += event.size
            total += event.size
            if total > highest[phase]:
                highest[phase], peaks[phase] = total, held.copy()
        return peaks

    def _note_product(self, left: Tensor, right: Tensor) -> None:
        if left.dtype == torch.bfloat16 and left.numel() > 0:
            self.products.setdefault((left.shape, left.stride(), right.shape, right.stride()), self.phase[0])

    def _note_grouped_product(self, left: Tensor, right: Tensor) -> None:
        """Note a shape for every number of rows: the router gives each group another number in each step."""
        rows = left.shape[-1 if left.dim() == right.dim() else 0]
        shapes = (left.shape, right.shape, right.stride())
        if (
            left.dtype == torch.bfloat16 and (*shapes, rows) not in self.products
        ):  # else an earlier layer has added them
            self.products.update({(*shapes, count): self.phase[0] for count in range(1, rows + 1)})

    def _record(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._live.get(address)
        if known is not None:
            return known[0]
        number = self._count
        self._count += 1
        size = -(-storage.nbytes() // self._block) * self._block
        self._live[address] = (number, size)
        self._events.append(_Event(number, size, self.phase))
        if self.heap is not None and self.phase != BUILD:
            self.heap.allocate(number, size)
        weakref.finalize(storage, self._freed, address)
        return number

    def _freed(self, address: int) -> None:
        number, size = self._live.pop(address)
        self._events.append(_Event(number, -size, self.phase))
        if self.heap is not None:
            self.heap.free(number)


def _grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of `torch._grouped_mm`: products of groups of rows with matrices, or of groups of both."""
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        shape = [offs.shape[0], *shape]
    elif left.dim() == 3 and right.dim() == 3:
        shape = [left.shape[0], *shape]
    return left.new_empty(shape, dtype=out_dtype)
