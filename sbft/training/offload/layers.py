"""The layers of a model's decoder, and which of their weights can be streamed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sbft.errors import ModelError
from sbft.optim.sharding import is_sharded
from sbft.recipe.offload import Offload
from sbft.training.offload.storage import size_bytes
from sbft.training.peft_models import is_peft_model, unwrap

BUFFERS = 3
"""Layers that are on the device at once: one computes, one is on its way in, one on its way out."""


@dataclass(frozen=True)
class Decoder:
    """The layers of a model, one after the other.

    Attributes:
        owner: the module whose forward calls the layers.
        layers: the layers.
    """

    owner: nn.Module
    layers: nn.ModuleList


def find_decoder(model: nn.Module) -> Decoder:
    """The layers of a model: the list of modules that holds most of its parameters.

    Raises:
        ModelError: if there is none that holds at least half of what is outside of embeddings.
    """
    base = unwrap(model)
    lists = [
        (sum(parameter.numel() for parameter in child.parameters()), module, child)
        for module in base.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) > 1
    ]
    head = getattr(base, "get_output_embeddings", lambda: None)()
    embeddings = {
        parameter
        for module in base.modules()
        if isinstance(module, nn.Embedding) or module is head
        for parameter in module.parameters()
    }
    rest = sum(parameter.numel() for parameter in base.parameters() if parameter not in embeddings)
    size, owner, layers = max(lists, key=lambda entry: entry[0], default=(0, base, nn.ModuleList()))
    if 2 * size < rest or not size:
        raise ModelError(
            f"offload streams the layers of a decoder, and {type(base).__name__} has no list of modules that holds most of its "
            "weights. Leave offload out."
        )
    return Decoder(owner, layers)


def streamed_parameters(
    model: nn.Module, decoder: Decoder, offload: Offload, releases: bool
) -> dict[int, list[nn.Parameter]]:
    """The parameters of each layer that is streamed, by the layer's number.

    Weights that another module uses too stay on the device, and so do those of adapters. Where gradients are not released,
    all that is trained stays.

    Args:
        model: the model, or an adapter on it.
        decoder: its layers.
        offload: how many are streamed.
        releases: whether weights are updated within backward.

    Raises:
        ModelError: if no weight can be streamed.
    """
    users: dict[Tensor, set[int]] = {}
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(parameter, set()).add(number)
    within = {module for layer in decoder.layers for module in layer.modules()}
    elsewhere = {
        parameter for module in model.modules() if module not in within for parameter in module._parameters.values()
    }
    keeps_trained = not releases or is_peft_model(model)
    streamed: dict[int, list[nn.Parameter]] = {}
    for number in offload.streamed(len(decoder.layers)):
        streamed[number] = [
            parameter
            for parameter in decoder.layers[number].parameters()
            if users[parameter] == {number}
            and parameter not in elsewhere
            and not (keeps_trained and parameter.requires_grad)
            and not is_sharded(parameter)
            and parameter.numel()
        ]
    streamed = {number: parameters for number, parameters in streamed.items() if parameters}
    if not streamed:
        raise ModelError(
            "offload finds no weight that could leave the device: all are trained, and none is updated within backward. Train "
            "with one of sbft's optimizers and gradient_release=True, or leave offload out."
        )
    return streamed


def buffers_for(layers: int, trains: bool) -> int:
    """How many layers are on the device at once, of those that are streamed.

    Args:
        layers: how many are streamed.
        trains: whether any of their weights is trained; what is only read needs no place on its way out.
    """
    return min(BUFFERS if trains else BUFFERS - 1, max(layers, 2))


def streamed_bytes(streamed: dict[int, list[nn.Parameter]]) -> int:
    """Bytes of the host's memory that the layers take."""
    return sum(size_bytes(parameters) for parameters in streamed.values())
