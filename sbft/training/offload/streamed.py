"""A model whose layers are streamed: the hooks that bring each layer when forward, backward or an update reaches it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sbft.grid.tensor import GridTensor
from sbft.recipe.offload import Offload
from sbft.training.offload.activations import SavedInput, SavedInputs
from sbft.training.offload.four_bits import streamed_products
from sbft.training.offload.layers import buffers_for, find_decoder, streamed_parameters
from sbft.training.offload.link import Link
from sbft.training.offload.saved import SavedWeights
from sbft.training.offload.schedule import Schedule
from sbft.training.offload.storage import StreamedLayer


class StreamedModel:
    """Keeps layers of a model in the host's memory, and brings each to the device while it is used.

    Forward, in training, evaluation and generation, brings layers one by one, and so does backward, with or without gradient
    checkpointing. Between steps all streamed weights are in the host's memory, as plain parameters.

    Args:
        model: on the CPU; all but the streamed weights is moved to the device.
        offload: which layers.
        link: to the device.
        releases: whether weights are updated within backward; otherwise only what is frozen is streamed.

    Raises:
        ModelError: if the model's layers cannot be found, or none of their weights can be streamed.
        OffloadError: if the host's memory cannot be had.
    """

    def __init__(self, model: nn.Module, offload: Offload, link: Link, *, releases: bool = True) -> None:
        decoder = find_decoder(model)
        parameters = streamed_parameters(model, decoder, offload, releases)
        self.link = link
        layers = {number: StreamedLayer(number, of_layer, link) for number, of_layer in parameters.items()}
        self.parameters = {parameter for layer in layers.values() for parameter in layer.parameters}
        self._move_rest(model)
        trains = any(parameter.requires_grad for parameter in self.parameters)
        self.schedule = Schedule(
            list(layers.values()), buffers_for(len(layers), trains), link
        )
        need = functools.partial(self.schedule.need, step=-1)
        self._saved = SavedWeights(self.schedule, need)
        self._inputs = SavedInputs(link) if offload.activations else None
        self._open: list[contextlib.ExitStack] = []
        self._within: StreamedLayer | None = None
        self._restore: list[Callable[[], object]] = []
        self._handles: list[Any] = [
            decoder.owner.register_forward_pre_hook(self._begin_forward),
            decoder.owner.register_forward_hook(self._end_forward, always_call=True),
        ]
        for number, module in enumerate(decoder.layers):
            enter = functools.partial(self._enter, layers.get(number))
            leave = functools.partial(self._leave, number == len(decoder.layers) - 1)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
            if number in layers:
                self._restore.extend(streamed_products(module, layers[number], need))

    @property
    def is_attached(self) -> bool:
        """Whether layers are still streamed; false after `remove`."""
        return bool(self._handles)

    @property
    def computes(self) -> bool:
        """Whether the layers' forward or a backward runs now."""
        return bool(self._open) or _in_backward()

    def before_update(self, parameter: Tensor) -> None:
        """A hook for a gradient that is complete: the parameter has to be on the device for its update."""
        self.schedule.need(self.schedule.owner(parameter))

    def after_update(self, parameter: Tensor) -> None:
        """A hook for a gradient that was used: the layer of which this was the last goes back."""
        self.schedule.note_update(parameter)  # type: ignore[arg-type]

    def place_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the state of streamed parameters to the device; one that was loaded is where the parameters were."""
        for parameter in self.parameters:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.to(self.link.device)

    def settle(self) -> None:
        """Have all weights in the host's memory, with every update; not within a forward or a backward."""
        while self._open:  # torch runs no hooks where Ctrl-C has ended a forward
            self._open.pop().close()
        self._within = None
        self.schedule.settle()

    def remove(self) -> None:
        """Stop streaming: hooks are removed, and the weights stay in the host's memory as plain parameters."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        for restore in self._restore:
            restore()
        self._handles.clear()
        self._restore.clear()
        self.link.close()

    def _move_rest(self, model: nn.Module) -> None:
        """Move to the device what is not streamed."""
        device = self.link.device
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter not in self.parameters and parameter.device != device:
                    moved: Any = parameter.detach().to(device)
                    parameter.data = moved if isinstance(parameter, GridTensor) else moved.data
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.device != device:
                        module._buffers[name] = buffer.to(device)

    # Hooks

    def _begin_forward(self, owner: nn.Module, args: Any) -> None:
        if not _in_backward():
            self.schedule.settle()
        stack = contextlib.ExitStack()
        if torch.is_grad_enabled():
            stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            if self._inputs is not None:
                self._inputs.begin()
        self._open.append(stack)

    def _end_forward(self, owner: nn.Module, args: Any, output: Any) -> None:
        if self._open:  # a hook of somebody else's may have failed before ours ran
            self._open.pop().close()
        if not torch.is_grad_enabled() and not _in_backward():
            self.schedule.settle()

    def _enter(self, layer: StreamedLayer | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer's forward begins; within backward, where checkpointing repeats its hooks as well."""
        backward = _in_backward()
        if layer is not None:
            if torch.is_grad_enabled() and not backward and not self._open:
                raise RuntimeError(
                    f"layer {layer.number} is offloaded, and was called outside of the forward of its model: backward would "
                    "not find its weights. Call the model, or call the layer under torch.no_grad()."
                )
            self.schedule.need(layer, -1 if backward else 1)
        if not backward:
            self._within = layer
            if self._inputs is not None:
                self._inputs.expect(_hidden_states((*args, kwargs.get("hidden_states"))))

    def _leave(self, is_last: bool, module: nn.Module, args: Any, output: Any) -> None:
        if _in_backward():
            return
        self._within = None
        if self._inputs is not None:
            self._inputs.expect(None if is_last else _hidden_states(output))

    def _pack(self, tensor: Tensor) -> Any:
        weight = self._saved.pack(tensor)
        if weight is not None:
            return weight
        saved: Any = None if self._inputs is None else self._inputs.pack(tensor)
        saved = tensor if saved is None else saved
        return saved if self._within is None else _InLayer(self._within, saved)

    def _unpack(self, packed: Any) -> Tensor:
        weight = self._saved.unpack(packed)
        if weight is not None:
            return weight
        if isinstance(packed, _InLayer):  # of a checkpointed layer, whose forward is repeated now
            self.schedule.need(packed.layer, -1)
            packed = packed.saved
        return packed.read() if isinstance(packed, SavedInput) else packed


class _InLayer(NamedTuple):
    """What autograd has saved during the forward of a layer."""

    layer: StreamedLayer
    saved: Tensor | SavedInput


def _hidden_states(values: Any) -> Tensor | None:
    """The first tensor of a layer's arguments or outputs."""
    values = (values,) if isinstance(values, Tensor) else values
    return next((value for value in values or () if isinstance(value, Tensor)), None)


def _in_backward() -> bool:
    """Whether this code runs within a backward, as the repeated forward of a checkpointed layer does."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def streamed(model: nn.Module, offload: Offload, link: Link, *, releases: bool = True) -> Iterator[StreamedModel]:
    """`StreamedModel` for the time of a block."""
    made = StreamedModel(model, offload, link, releases=releases)
    try:
        yield made
    finally:
        made.remove()
