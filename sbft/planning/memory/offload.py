"""What streaming layers from the host's memory changes: memory on both sides, bytes moved, and time."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from sbft.planning.memory.skeleton import shortened, skeleton
from sbft.planning.memory.trace import Phase
from sbft.recipe import Recipe
from sbft.recipe.offload import Offload
from sbft.training.offload.layers import buffers_for, find_decoder, streamed_parameters
from sbft.training.offload.storage import size_bytes

HOST_MARGIN_BYTES = 2 << 30
"""What the process takes of the host's memory beside the streamed layers."""
_MEASURED_BYTES, _MEASURED_SIDE = 256 << 20, 8192
_INPUTS_ON_DEVICE = 2
"""Saved inputs of layers that are on the device at once: one in use, one on its way."""


@dataclass(frozen=True)
class Speeds:
    """Of the machine that is planned for."""

    link_bytes_per_s: float
    """What the link between host and device moves in one direction; both are used at the same time."""
    flops: float
    """Floating-point operations per second of the device, in large bfloat16 products."""


USUAL_SPEEDS = Speeds(25e9, 100e12)
"""Assumed of a GPU that this machine does not have: PCIe 4.0 with 16 lanes, and what GPUs with 24 GiB reach."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer as it is streamed."""

    size_bytes: int
    """What moves to the device."""
    trained_bytes: int
    """What moves back after its update."""
    elements: int
    """Weights, each of which takes part in two operations per token of forward."""


@dataclass(frozen=True)
class Streaming:
    """The streamed layers of a model, and what they cost."""

    layers: int
    """How many are streamed."""
    saved_bytes: int
    """How much less memory the device needs."""
    host_bytes: int
    """What they take of the host's memory, saved inputs included."""
    moved_in_bytes: int
    """What moves to the device in a step: every layer once in forward and once in backward."""
    moved_out_bytes: int
    """What moves back in a step."""
    elements: int
    """Weights of all decoder layers, streamed or not."""

    def hidden_from_tokens(self, speeds: Speeds) -> int:
        """From how many tokens per step the arithmetic of forward, the shorter half, takes as long as its transfers."""
        inward_s = self.moved_in_bytes / 2 / speeds.link_bytes_per_s
        return math.ceil(inward_s * speeds.flops / (2 * self.elements))

    def step_s(self, tokens: int, speeds: Speeds, *, checkpointing: bool) -> float:
        """Seconds of a step's products and transfers. Forward and backward each take as long as the slower of the two.

        Args:
            tokens: per step.
            speeds: of the machine.
            checkpointing: whether backward repeats forward.
        """
        forward_s = 2 * self.elements * tokens / speeds.flops
        inward_s = self.moved_in_bytes / 2 / speeds.link_bytes_per_s
        outward_s = self.moved_out_bytes / speeds.link_bytes_per_s
        return max(forward_s, inward_s) + max((3 if checkpointing else 2) * forward_s, inward_s, outward_s)


def measured_speeds() -> Speeds:
    """Those of this machine's GPU: the medians of a few copies from pinned memory, and of a few large products."""
    source = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    factor = torch.ones(_MEASURED_SIDE, _MEASURED_SIDE, dtype=torch.bfloat16, device="cuda")
    copy_s = _median_s(lambda: target.copy_(source, non_blocking=True))
    product_s = _median_s(lambda: factor @ factor)
    return Speeds(_MEASURED_BYTES / copy_s, 2 * _MEASURED_SIDE**3 / product_s)


def _median_s(action: Callable[[], object]) -> float:
    """Seconds of something that the GPU does, the first time left out."""
    action()
    times_s = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times_s)


def decoder_layers(recipe: Recipe, config: PreTrainedConfig, made: int, period: int) -> list[Layer]:
    """The layers of a recipe's model.

    Args:
        recipe: resolved.
        config: of the model.
        made: how many layers to make; the others are like them.
        period: after how many layers they repeat.

    Raises:
        ModelError: if they cannot be found, or none could be streamed.
    """
    count = config.get_text_config().num_hidden_layers
    model = skeleton(recipe, config if made >= count else shortened(config, made))
    decoder = find_decoder(model)
    streamed = streamed_parameters(model, decoder, Offload(), bool(recipe.optimizer.gradient_release))
    layers = []
    for number, layer in enumerate(decoder.layers):
        parameters = streamed.get(number, [])
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in layer.parameters())
        layers.append(Layer(size_bytes(parameters), size_bytes(trained), elements))
    while len(layers) < count:
        layers.append(layers[-period])
    return layers


def streaming(layers: list[Layer], offload: Offload, inputs_bytes: int = 0) -> Streaming:
    """What streaming some of the layers costs and saves.

    Args:
        layers: all layers of the decoder.
        offload: which of them are streamed; "auto" stands for all.
        inputs_bytes: bytes of one layer's saved input, if they are in the host's memory too, else 0.
    """
    chosen = [layers[number] for number in offload.streamed(len(layers))]
    trains = any(layer.trained_bytes for layer in chosen)
    total = sum(layer.size_bytes for layer in chosen)
    on_device = buffers_for(len(chosen), trains) * max((layer.size_bytes for layer in chosen), default=0)
    inputs = max(len(layers) - _INPUTS_ON_DEVICE, 0) * inputs_bytes
    return Streaming(
        layers=len(chosen),
        saved_bytes=total - on_device,
        host_bytes=total + len(layers) * inputs_bytes,
        moved_in_bytes=2 * total + inputs,
        moved_out_bytes=sum(layer.trained_bytes for layer in chosen) + inputs,
        elements=sum(layer.elements for layer in layers),
    )


def fewest_layers(layers: list[Layer], needed_bytes: int, most_bytes: float, inputs_bytes: int = 0) -> int:
    """The fewest layers whose streaming lets a step fit; all of them if it does not fit even then.

    None if it fits without, unless saved inputs are to be moved, which takes a streamed layer.

    Args:
        layers: all layers of the decoder.
        needed_bytes: what a step needs if no layer is streamed.
        most_bytes: what it may need.
        inputs_bytes: as for `streaming`; what `needed_bytes` has of them is left as it is.
    """
    if needed_bytes <= most_bytes:
        return 1 if inputs_bytes else 0
    for count in range(1, len(layers)):
        if needed_bytes - streaming(layers, Offload(count), inputs_bytes).saved_bytes <= most_bytes:
            return count
    return len(layers)


def without_inputs(phases: Mapping[Phase, Counter[str]], layers: int, inputs_bytes: int) -> dict[Phase, Counter[str]]:
    """The memory of a step whose saved inputs of layers are in the host's memory.

    Args:
        phases: bytes of each kind in each phase; a layer's phase may be counted from the last layer, which is -1.
        layers: of the decoder.
        inputs_bytes: bytes of one layer's saved input.
    """
    changed = {}
    for (name, layer), held in phases.items():
        alive = layers if layer is None else (layer if layer >= 0 else layers + layer) + 1
        moved = min(max(alive - _INPUTS_ON_DEVICE, 0) * inputs_bytes, held["activations"])
        changed[name, layer] = Counter({**held, "activations": held["activations"] - moved})
    return changed
