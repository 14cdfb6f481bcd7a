"""Where the weights of a streamed layer are: one piece of the host's memory, and a slot on the device while it is used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sbft.errors import TrainingError
from sbft.grid.tensor import GridTensor
from sbft.native.mapped import MappedFiles
from sbft.training.offload.link import Event, Link

_ALIGNMENT = 256
"""Bytes that every tensor begins at a multiple of, as torch's allocators have it."""


@dataclass(frozen=True)
class _Piece:
    """One tensor that a parameter is stored in."""

    name: str
    """That of a grid's tensor; "" for a plain parameter."""
    begin: int
    size_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def on(self, memory: Tensor) -> Tensor:
        """A view of memory that the layer is in."""
        return memory[self.begin : self.begin + self.size_bytes].view(self.dtype).view(self.shape)

    def in_host(self, memory: Tensor) -> Tensor:
        """The same with a storage of its own, as what saves models requires: it takes shared storage for tied weights."""
        part: Tensor = torch.from_numpy(memory.numpy()[self.begin : self.begin + self.size_bytes])
        return part.view(self.dtype).view(self.shape)


@dataclass(eq=False)
class Slot:
    """Memory of the device that holds one layer at a time.

    Attributes:
        memory: uint8, as large as the largest layer.
        layer: that is in it, or on its way.
        arrived: when the layer is there; None once the arithmetic waits for it.
        busy: what a copy into it has to wait for.
        last_used: a count that rises, of when the layer was asked for.
    """

    memory: Tensor
    layer: StreamedLayer | None = None
    arrived: Event | None = None
    busy: list[Event] = field(default_factory=list)
    last_used: int = 0


class StreamedLayer:
    """The parameters of one layer that are streamed. At rest, `param.data` is in the host's memory.

    Args:
        number: of the layer in the model.
        parameters: each in no other layer; they are moved into the host's memory of `link` one by one.
        link: where memory comes from.

    Attributes:
        slot: where it is on the device, or on its way to; None if it is not.
        written: when its last copy to the host is done; None if none is under way.
        is_changed: whether weights were updated since they were last copied to the host.
        updated: the parameters that were updated since.
        updates: how often each parameter was updated.
    """

    def __init__(self, number: int, parameters: Sequence[nn.Parameter], link: Link) -> None:
        self.number = number
        # Those that are trained first, so that one copy brings them back.
        self.parameters = sorted(parameters, key=lambda parameter: not parameter.requires_grad)
        self._pieces: list[list[_Piece]] = []
        begin = 0
        for parameter in self.parameters:
            pieces = []
            for name, tensor in _tensors(parameter).items():
                pieces.append(_Piece(name, begin, tensor.nbytes, tensor.dtype, tensor.shape))
                begin += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._pieces.append(pieces)
        self.size_bytes = begin
        self._begins = [pieces[0].begin for pieces in self._pieces]
        self._host = link.host_memory(begin)
        self._at_rest: list[dict[str, Tensor]] = []
        files = MappedFiles()
        for parameter, pieces in zip(self.parameters, self._pieces, strict=True):
            here = {piece.name: piece.in_host(self._host) for piece in pieces}
            before = [(tensor.data_ptr(), tensor.nbytes) for tensor in _tensors(parameter).values()]
            for name, tensor in _tensors(parameter).items():
                here[name].copy_(tensor)
            self._at_rest.append(here)
            _set(parameter, here)
            for address, size in before:
                files.forget(address, size)
        self.slot: Slot | None = None
        self.written: Event | None = None
        self.is_changed = False
        self.updated: set[nn.Parameter] = set()
        self.updates = [0] * len(self.parameters)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that require a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def host(self) -> Tensor:
        """The host's memory that it is in: uint8.

        Raises:
            TrainingError: if a parameter is no longer there.
        """
        for parameter, here in zip(self.parameters, self._at_rest, strict=True):
            for name, tensor in _tensors(parameter).items():
                if name not in here or tensor.data_ptr() != here[name].data_ptr():
                    raise TrainingError(
                        f"A weight of layer {self.number}, of shape {tuple(parameter.shape)}, was replaced while the layer was "
                        "offloaded, and would be trained no longer. Change it in place (copy_), or call "
                        "trainer.stop_offloading() first."
                    )
        return self._host

    def trained_part(self, memory: Tensor) -> Tensor:
        """The part of memory that holds all parameters that are trained."""
        end = 0
        for parameter, pieces in zip(self.parameters, self._pieces, strict=True):
            if parameter.requires_grad:
                end = pieces[-1].begin + pieces[-1].size_bytes
        return memory[:end]

    def host_of_trained(self) -> Tensor:
        """The host's memory of all parameters that are trained: uint8."""
        return self.trained_part(self._host)

    def use_device(self) -> None:
        """Let the parameters be what is in the slot."""
        assert self.slot is not None
        with torch.inference_mode(False):
            for parameter, pieces in zip(self.parameters, self._pieces, strict=True):
                _set(parameter, {piece.name: piece.on(self.slot.memory) for piece in pieces})

    def use_host(self) -> None:
        """Let the parameters be what is in the host's memory."""
        with torch.inference_mode(False):
            for parameter, here in zip(self.parameters, self._at_rest, strict=True):
                _set(parameter, here)

    def parameter_at(self, offset: int) -> int:
        """The index of the parameter that has the byte `offset` of the layer's memory."""
        return bisect_right(self._begins, offset) - 1

    def index_of(self, parameter: Tensor) -> int:
        """The index of a parameter."""
        return next(index for index, mine in enumerate(self.parameters) if mine is parameter)


def size_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Bytes that a layer with these parameters takes on either side."""
    tensors = (tensor for parameter in parameters for tensor in _tensors(parameter).values())
    return sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)


def _tensors(parameter: Tensor) -> dict[str, Tensor]:
    """What a parameter is stored in, by name."""
    return parameter.quantized.tensors if isinstance(parameter, GridTensor) else {"": parameter.detach()}


def _set(parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
    kind: Any = parameter
    if isinstance(kind, GridTensor):
        kind.data = kind.around(kind.quantized.with_tensors(tensors["codes"], tensors.get("low"), tensors["scales"]))
    else:
        parameter.data = tensors[""]
