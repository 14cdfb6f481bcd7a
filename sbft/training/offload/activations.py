"""The inputs of layers that gradient checkpointing saves: in the host's memory until backward reaches their layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sbft.training.offload.link import Event, Link

_ROUNDED_TO = 1 << 16
"""Bytes; batches of varying length then seldom need memory of another size."""


@dataclass
class _Place:
    """Memory of the host that holds one input after another."""

    memory: Tensor
    busy: list[Event] = field(default_factory=list)


class SavedInput:
    """An input that is in the host's memory, or on its way there or back."""

    def __init__(self, inputs: SavedInputs, tensor: Tensor, place: _Place, before: SavedInput | None) -> None:
        self._inputs, self._place = inputs, place
        self._like = tensor.dtype, tensor.shape
        self._size = tensor.nbytes
        self._before = None if before is None else weakref.ref(before)
        self._back: tuple[Tensor, Event] | None = None
        link = inputs.link
        self._stored = link.copy_out(place.memory[: self._size], _as_bytes(tensor), [link.mark(), *place.busy])

    def _fetch(self) -> tuple[Tensor, Event]:
        """Begin to bring it back."""
        if self._back is None:
            link, (dtype, shape) = self._inputs.link, self._like
            tensor = torch.empty(shape, dtype=dtype, device=link.device)
            source = self._place.memory[: self._size]
            self._back = tensor, link.copy_in(_as_bytes(tensor), source, [self._stored, link.mark()])
        return self._back

    def read(self) -> Tensor:
        """The input on the device; that of the layer before follows."""
        tensor, arrived = self._fetch()
        self._inputs.link.wait(arrived)
        before = None if self._before is None else self._before()
        if before is not None:
            before._fetch()
        return tensor

    def __del__(self) -> None:
        self._place.busy = [self._stored] if self._back is None else [self._stored, self._back[1]]
        self._inputs.free.append(self._place)


class SavedInputs:
    """Keeps the inputs of layers in the host's memory.

    An input is known by its address: it is the output of the layer before. That of the first layer is known where its hooks run
    before checkpointing saves it; otherwise it stays on the device. The output of the last layer stays as well.

    Args:
        link: copies them.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.free: list[_Place] = []
        self._expected: tuple[int, int] | None = None
        self._last: weakref.ref[SavedInput] | None = None

    def expect(self, tensor: Tensor | None) -> None:
        """Take note of what the next layer gets; None where nothing is to be kept."""
        is_plain = type(tensor) is Tensor and tensor.is_contiguous()
        self._expected = (tensor.data_ptr(), tensor.nbytes) if tensor is not None and is_plain else None

    def pack(self, tensor: Tensor) -> SavedInput | None:
        """What to save in the place of a layer's input; None if the tensor is none."""
        if self._expected is None or type(tensor) is not Tensor or tensor.layout != torch.strided:
            return None
        if (tensor.data_ptr(), tensor.nbytes) != self._expected or not tensor.is_contiguous():
            return None
        self._expected = None
        saved = SavedInput(self, tensor, self._take(tensor.nbytes), None if self._last is None else self._last())
        self._last = weakref.ref(saved)
        return saved

    def begin(self) -> None:
        """A new forward begins."""
        self._expected = self._last = None

    def _take(self, size_bytes: int) -> _Place:
        fitting = [place for place in self.free if place.memory.nbytes >= size_bytes]
        if fitting:
            place = min(fitting, key=lambda place: place.memory.nbytes)
            self.free.remove(place)
            return place
        if self.free:  # too small, and as many layers as before need a larger one now
            small = self.free.pop()
            for event in small.busy:
                self.link.finish(event)
            self.link.free_host_memory(small.memory)
        return _Place(self.link.host_memory(-(-size_bytes // _ROUNDED_TO) * _ROUNDED_TO))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
