"""Which layers are on the device when: the next is brought while the present one computes; one that changed is written back.

Nothing is given up before its place is wanted. So the last layers of forward are still there when backward begins with them,
and a layer that is needed against all expectation is simply brought again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sbft.training.offload.link import Link
from sbft.training.offload.storage import Slot, StreamedLayer


class Schedule:
    """Brings layers into a few slots of the device, and writes them back.

    Args:
        layers: in the order of forward.
        slots: how many layers are on the device at once; at least two.
        link: does the copies.
    """

    def __init__(self, layers: Sequence[StreamedLayer], slots: int, link: Link) -> None:
        self.layers = list(layers)
        self._link = link
        self._places = {layer: place for place, layer in enumerate(self.layers)}
        self._owners: dict[nn.Parameter, StreamedLayer] = {
            parameter: layer for layer in self.layers for parameter in layer.parameters
        }
        largest = max(layer.size_bytes for layer in self.layers)
        self.slots = [Slot(link.device_memory(largest)) for _ in range(slots)]
        self._count = 0
        self.launch_updates: Callable[[], None] = lambda: None
        """Launches updates that wait for one another, which has to be before their layer leaves."""

    def need(self, layer: StreamedLayer, step: int = 0) -> Slot:
        """Have a layer on the device for what the device computes from now on.

        Args:
            layer: the layer.
            step: 1 where the next layer follows, -1 where the one before it does, 0 where this is not known.
        """
        slot = self._bring(layer)
        if slot.arrived is not None:
            self._link.wait(slot.arrived)
            slot.arrived = None
            layer.use_device()
        place = self._places[layer] + step
        if step and 0 <= place < len(self.layers):
            self._bring(self.layers[place], keep=layer)
            self._count += 1
            slot.last_used = self._count  # what is in use is given up last
        return slot

    def owner(self, parameter: Tensor) -> StreamedLayer:
        """The layer that has a streamed parameter."""
        return self._owners[parameter]  # type: ignore[index]

    def note_update(self, parameter: nn.Parameter) -> None:
        """A parameter was updated on the device. With the last of its layer, the layer's way back begins."""
        layer = self._owners[parameter]
        layer.updates[layer.index_of(parameter)] += 1
        layer.is_changed = True
        layer.updated.add(parameter)
        if len(layer.updated) == len(layer.trained):
            self._write_back(layer)

    def settle(self) -> None:
        """Have all weights in the host's memory: what is changed there from now on is what the next forward uses."""
        for slot in self.slots:
            self._vacate(slot)
        for layer in self.layers:
            if layer.written is not None:
                self._link.finish(layer.written)
                layer.written = None

    def _bring(self, layer: StreamedLayer, keep: StreamedLayer | None = None) -> Slot:
        """Begin to copy a layer to the device if it is not there, over any layer but `keep`."""
        self._count += 1
        if layer.slot is None:
            candidates = [slot for slot in self.slots if slot.layer is None or slot.layer is not keep]
            slot = min(candidates, key=lambda slot: (slot.layer is not None, slot.last_used))
            self._vacate(slot)
            after = slot.busy if layer.written is None else [*slot.busy, layer.written]
            slot.arrived = self._link.copy_in(slot.memory[: layer.size_bytes], layer.host(), after)
            slot.layer, slot.busy, layer.slot = layer, [], slot
        layer.slot.last_used = self._count
        return layer.slot

    def _vacate(self, slot: Slot) -> None:
        layer = slot.layer
        if layer is None:
            return
        if layer.is_changed:
            self._write_back(layer)
        slot.busy = [self._link.release(slot.memory)]
        if layer.written is not None:
            slot.busy.append(layer.written)
        if slot.arrived is not None:  # nobody has waited for it, so it may still be on its way
            slot.busy.append(slot.arrived)
        slot.layer = slot.arrived = layer.slot = None
        layer.use_host()

    def _write_back(self, layer: StreamedLayer) -> None:
        assert layer.slot is not None
        self.launch_updates()
        source = layer.trained_part(layer.slot.memory)
        layer.written = self._link.copy_out(layer.host_of_trained(), source, [self._link.mark()])
        layer.is_changed = False
        layer.updated.clear()
