"""What autograd saves of streamed weights: where they are in their layer, not the memory that another layer is in by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid
from sbft.grid.tensor import GridTensor
from sbft.training.offload.schedule import Schedule
from sbft.training.offload.storage import Slot, StreamedLayer


@dataclass(frozen=True)
class _Saved:
    """A tensor that was saved while its layer was on the device."""

    layer: StreamedLayer
    parameter: int
    updates: int
    """Of the parameter, when it was saved."""
    offset: int
    """Of its first byte, in the layer."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _SavedOnGrid:
    """A weight on a grid, or its transpose."""

    kind: type[GridTensor]
    grid: Grid
    is_transposed: bool
    tensors: dict[str, _Saved]


class SavedWeights:
    """Packs what autograd saves of streamed weights, and unpacks it from wherever the layer is then.

    Args:
        schedule: brings the layer back.
        leave: called with a layer that is needed, and has it brought; returns its slot.
    """

    def __init__(self, schedule: Schedule, need: Callable[[StreamedLayer], Slot]) -> None:
        self._slots = {slot.memory.untyped_storage().data_ptr(): slot for slot in schedule.slots}
        self._need = need

    def pack(self, tensor: Tensor) -> Any:
        """What to save of a tensor in its place; None if it is no streamed weight."""
        if isinstance(tensor, GridTensor):
            parts = {name: self.pack(part) for name, part in tensor.quantized.tensors.items()}
            if any(part is None for part in parts.values()):
                return None
            return _SavedOnGrid(type(tensor), tensor.grid, tensor.is_transposed, parts)
        if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            return None
        slot = self._slots.get(tensor.untyped_storage().data_ptr())
        if slot is None or slot.layer is None or tensor.numel() == 0:
            return None
        layer, offset = slot.layer, tensor.data_ptr() - slot.memory.data_ptr()
        parameter = layer.parameter_at(offset)
        updates = layer.updates[parameter]
        return _Saved(layer, parameter, updates, offset, tensor.dtype, tensor.shape, tensor.stride())

    def unpack(self, saved: Any) -> Tensor | None:
        """The tensor that `pack` returned this for; None if that was something else.

        Raises:
            RuntimeError: if the weight was updated since, as autograd does for tensors that were changed in place.
        """
        if isinstance(saved, _SavedOnGrid):
            tensors = {name: self._read(part) for name, part in saved.tensors.items()}
            quantized = Quantized(saved.grid, tensors["codes"], tensors.get("low"), tensors["scales"])
            return saved.kind(quantized, saved.is_transposed)
        return self._read(saved) if isinstance(saved, _Saved) else None

    def _read(self, saved: _Saved) -> Tensor:
        layer = saved.layer
        if layer.updates[saved.parameter] != saved.updates:
            raise RuntimeError(
                f"backward needs a weight of layer {layer.number}, of shape {tuple(saved.shape)}, as it was in forward, and it "
                "was updated since"
            )
        whole = self._need(layer).memory.view(saved.dtype)
        return whole.as_strided(saved.shape, saved.stride, saved.offset // saved.dtype.itemsize)
