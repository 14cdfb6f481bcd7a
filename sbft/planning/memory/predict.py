"""Predicts the peak memory of a training run, with its parts, from the model's config without its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from sbft.data.collate import Collator
from sbft.errors import SbftError
from sbft.models.load import load_config
from sbft.native.memory import available_bytes, resident_bytes, type_of
from sbft.native.onednn_products import products_bytes
from sbft.planning.memory.graphs import as_graphs, pool_bytes_of_graphs, shape_in_graph, static_bytes
from sbft.planning.memory.offload import Layer, Streaming, decoder_layers, fewest_layers, streaming, without_inputs
from sbft.planning.memory.skeleton import period_of_layers, shortened, skeleton
from sbft.planning.memory.step import BACKWARD, StepShape, TracedStep, trace_step
from sbft.planning.memory.trace import Phase
from sbft.planning.memory.usable import SURE
from sbft.recipe import Recipe
from sbft.recipe.offload import Offload

MEBIBYTE = 1 << 20
# What libraries take on their first use in training, beside tensors: pages of torch's library, and threads. It was the
# median of what 65 measured runs held beyond everything else, 18 MiB (benchmarks/README.md). Code has grown since: SmolLM2-135M
# at 64 tokens, in bfloat16, in 8 bits, untied and with LoRA, held another 11 to 15 MiB.
_FIRST_USE_BYTES = 31 * MEBIBYTE
# Narrow models take less: products have smaller buffers. In pretraining they took about 18 MiB in bfloat16, and 11, 12 and
# 15 MiB in float32 with widths of 96, 128 and 192 (benchmarks/lab/README.md). No width from there to 512 was measured.
_NARROW_WIDTH = 320
_FIRST_USE_NARROW_BYTES = 18 * MEBIBYTE
_FIRST_USE_FLOAT32_BYTES, _FIRST_USE_BYTES_PER_WIDTH = 8 * MEBIBYTE, MEBIBYTE // 32
# cuBLAS keeps a workspace for each thread that calls it: one for forward, one for backward. It is larger on Hopper.
_CUBLAS_BYTES, _CUBLAS_BYTES_HOPPER = 8 * MEBIBYTE + MEBIBYTE // 8, 32 * MEBIBYTE
_HOPPER = (9, 0)
_CUDA_CONTEXT_BYTES = 512 * MEBIBYTE
_FEWEST_LAYERS = 2
_periods: dict[str, int | None] = {}  # by config; a plan asks for the same one dozens of times
# Of the last recipe, whatever it streams: a plan asks for the same at several lengths, and for some with and without streaming.
_traced: dict[tuple[Any, ...], TracedStep] = {}
_layers: dict[tuple[str, str], list[Layer]] = {}

PARTS = ("weights", "gradients", "optimizer_state", "activations", "logits", "workspace", "runtime")


class PlanError(SbftError):
    """The memory of a model cannot be predicted, because a step of it does not run on tensors without values."""


@dataclass(frozen=True)
class Prediction:
    """The predicted peak of a training run."""

    parts: dict[str, int]
    """Bytes of each of `PARTS` at the peak. "runtime" is what the process takes beside tensors: on CUDA outside torch's
    allocator, on a CPU what it holds already."""
    phase: str
    """The part of a step in which the peak occurs."""
    above_model_bytes: int
    """What training adds to the loaded model."""
    heap_ratio: float | None
    """On a CPU, resident bytes of the heap per byte in use; None on CUDA, where `peak_bytes` is what torch allocates."""
    streaming: Streaming | None = None
    """On CUDA, the layers that are streamed from the host's memory; None if none are."""

    @property
    def peak_bytes(self) -> int:
        """The peak as a run's record has it: on CUDA without the runtime."""
        return self.needed_bytes - (self.parts["runtime"] if self.heap_ratio is None else 0)

    @property
    def needed_bytes(self) -> int:
        """The free memory that the process requires on the device."""
        return sum(self.parts.values())


def predict_recipe(
    recipe: Recipe,
    *,
    longest: int,
    padded: bool | None = None,
    labelled: int | None = None,
    lengths: int = 1,
    label_counts: int = 1,
    device: torch.device | str | None = None,
    config: PreTrainedConfig | None = None,
    heap_ratio: float | None = None,
    memory_bytes: int | None = None,
) -> Prediction:
    """Predict the highest memory that training will hold, at its longest batch.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        longest: tokens of the longest example.
        padded: whether a batch of this width may hold padding, which requires a mask. When None, it does if a batch has
            several examples.
        labelled: the most tokens with a label in an example; all but the first when None.
        lengths: number of different batch lengths, padding included: a CPU keeps compiled products for each.
        label_counts: number of different label counts.
        device: type of device to train on, which this machine need not have; where this process would train, when None.
        config: of the model; read from where the recipe says when None.
        heap_ratio: the ratio of a prediction at another length, on a CPU; saves tracing all layers.
        memory_bytes: of the GPU, which decides how many layers `offload: {layers: auto}` streams; that of this machine's GPU
            when None.

    Raises:
        PlanError: if the model cannot be traced.
        SbftError: if the model is not found, or cannot be made trainable as the recipe says.
    """
    kind = "cpu" if type_of(device) == "cpu" else "cuda"
    if config is None:
        config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    whole = kind == "cpu" and heap_ratio is None
    shape = _shape(recipe, longest, padded, labelled)
    graphed = as_graphs(recipe, kind)
    if graphed:
        shape = shape_in_graph(shape, whole=lengths == 1 and labelled == longest - 1 and not padded)
    step = _step(recipe, config, shape, kind, _checkpoints(recipe), whole=whole)
    inputs_bytes = _inputs_bytes(recipe, config, shape) if kind == "cuda" else 0
    if inputs_bytes:
        layers = config.get_text_config().num_hidden_layers
        step = replace(step, phases=without_inputs(step.phases, layers, inputs_bytes))
    peak = max(step.phases, key=lambda phase: step.phases[phase].total())
    parts = {name: step.phases[peak][name] for name in PARTS}
    if kind == "cuda":
        parts["workspace"] += 2 * _cublas_bytes()
        parts["runtime"] = _CUDA_CONTEXT_BYTES
        if graphed:  # forward runs on the default stream too, before training
            parts["workspace"] += _cublas_bytes() + static_bytes(shape)
            parts["runtime"] += pool_bytes_of_graphs(step.phases[peak])
        heap_ratio = None
    else:
        held = sum(parts.values()) - parts["weights"]
        if heap_ratio is None:
            assert step.heap_bytes is not None
            heap_ratio = max(step.heap_bytes / held, 1.0)
        compiled = products_bytes(step.products * lengths + step.head_products * label_counts)
        parts["workspace"] += round(held * (heap_ratio - 1)) + _first_use_bytes(recipe, config) + compiled
        parts["runtime"] = resident_bytes()
    above = sum(parts.values()) - parts["weights"] - parts["runtime"]
    prediction = Prediction(parts, _name(peak), above, heap_ratio)
    return _streamed(prediction, recipe, config, inputs_bytes, memory_bytes) if kind == "cuda" else prediction


def _streamed(
    prediction: Prediction, recipe: Recipe, config: PreTrainedConfig, inputs_bytes: int, memory_bytes: int | None
) -> Prediction:
    """The same with the layers that `offload` names in the host's memory."""
    offload = recipe.offloaded
    if offload is None:
        return prediction
    layers = _decoder_layers(recipe, config)
    if offload.layers == "auto":
        most = SURE * (available_bytes("cuda") if memory_bytes is None else memory_bytes)
        offload = Offload(fewest_layers(layers, prediction.needed_bytes, most, inputs_bytes), offload.activations)
    if offload.layers == 0:
        return prediction
    made_streaming = streaming(layers, offload, inputs_bytes)
    parts = {**prediction.parts, "weights": prediction.parts["weights"] - made_streaming.saved_bytes}
    return replace(prediction, parts=parts, streaming=made_streaming)


def _decoder_layers(recipe: Recipe, config: PreTrainedConfig) -> list[Layer]:
    key = _without_offload(recipe).model_dump_json(), config.to_json_string()
    if key not in _layers:
        _layers.clear()
        short, long = _few_layers(recipe, config)
        _layers[key] = decoder_layers(recipe, config, long, (long - short) or 1)
    return _layers[key]


def _without_offload(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"offload": None})


def _inputs_bytes(recipe: Recipe, config: PreTrainedConfig, shape: StepShape) -> int:
    """Bytes of one layer's saved input, if these are in the host's memory; else 0."""
    if recipe.offloaded is None or not recipe.offloaded.activations:
        return 0
    itemsize = 2 if recipe.dtype == "bfloat16" else 4
    return int(shape.batch_size * shape.tokens * config.get_text_config().hidden_size * itemsize)


def _step(
    recipe: Recipe, config: PreTrainedConfig, shape: StepShape, kind: str, checkpointing: bool, *, whole: bool
) -> TracedStep:
    """As `_trace`; the same step is traced once."""
    recipe = _without_offload(recipe)
    key = (recipe.model_dump_json(), config.to_json_string())
    if any(other[:2] != key for other in _traced):
        _traced.clear()
    case = (*key, shape, kind, checkpointing, whole)
    if case not in _traced:
        _traced[case] = _trace(recipe, config, shape, kind, checkpointing, whole=whole)
    return _traced[case]


def _trace(
    recipe: Recipe, config: PreTrainedConfig, shape: StepShape, kind: str, checkpointing: bool, *, whole: bool
) -> TracedStep:
    """Trace a step of the model; where its layers are alike, extrapolate from two models with fewer layers.

    A heap is traced with all layers, because what it loses to gaps does not grow linearly with the layers.
    """
    layers = config.get_text_config().num_hidden_layers
    short, long = (layers, layers) if whole else _few_layers(recipe, config)
    try:
        if short + long >= layers:
            return trace_step(recipe, config, shape, kind, checkpointing=checkpointing)
        steps = [
            trace_step(recipe, shortened(config, count), shape, kind, checkpointing=checkpointing)
            for count in (short, long)
        ]
    except SbftError:
        raise
    except Exception as error:  # the model's own code may do anything with tensors without values
        reason = " ".join(str(error).split())[:300]
        raise PlanError(
            f"The memory of {recipe.model} cannot be predicted: a step of {type(config).__name__.removesuffix('Config')} "
            f"does not run on tensors without values. ({type(error).__name__}: {reason})"
        ) from error
    return _extrapolated(steps[0], steps[1], short, long, layers)


def _few_layers(recipe: Recipe, config: PreTrainedConfig) -> tuple[int, int]:
    """Two numbers of layers to extrapolate from; both are the number of all layers where that is not possible."""
    layers = config.get_text_config().num_hidden_layers
    period = _period(recipe, config)
    # Name patterns may select single layers.
    alike = all(pattern == "embeddings" for pattern in recipe.freeze) and not isinstance(recipe.grids, dict)
    targets = None if recipe.lora is None else recipe.lora.target_modules
    if period is None or not alike or (isinstance(targets, str) and targets != "all-linear"):
        return layers, layers
    fewest = max(2 * period, _FEWEST_LAYERS)
    short = fewest + (layers - fewest) % period
    return short, short + period


def _period(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    key = config.to_json_string()
    if key not in _periods:
        plain = recipe.model_copy(update={"lora": None, "freeze": [], "method": "sbft", "weights": None})
        _periods[key] = period_of_layers(config, skeleton(plain, config))
    return _periods[key]


def _extrapolated(short: TracedStep, long: TracedStep, short_layers: int, long_layers: int, layers: int) -> TracedStep:
    """Extrapolate linearly: each further layer adds the same weights, gradients, states and activations to every phase.

    A layer's phase is matched by its number from the first or from the last layer. Layers between hold no more than these.
    """
    ends = short_layers // 2
    first, second = _by_end(short.phases, short_layers, ends), _by_end(long.phases, long_layers, ends)
    phases: dict[Phase, Counter[str]] = {}
    for phase in first.keys() & second.keys():
        kinds = first[phase].keys() | second[phase].keys()
        phases[phase] = Counter(
            {kind: _line(first[phase][kind], second[phase][kind], short_layers, long_layers, layers) for kind in kinds}
        )
    return TracedStep(phases, None, long.products, long.head_products)


def _line(short: int, long: int, short_layers: int, long_layers: int, layers: int) -> int:
    return short + (long - short) * (layers - short_layers) // (long_layers - short_layers)


def _by_end(phases: dict[Phase, Counter[str]], layers: int, ends: int) -> dict[Phase, Counter[str]]:
    """The phases of the first and the last layers, the latter counted from -1 for the last; those between are left out."""
    by_end = {}
    for (name, layer), held in phases.items():
        if layer is None or layer < ends:
            by_end[name, layer] = held
        elif layer >= layers - ends:
            by_end[name, layer - layers] = held
    return by_end


def _shape(recipe: Recipe, longest: int, padded: bool | None, labelled: int | None) -> StepShape:
    size = recipe.largest_batch
    packed = recipe.data.packing
    multiple = 1 if packed else Collator.pad_to_multiple_of
    tokens = -(-longest // multiple) * multiple
    return StepShape(
        batch_size=size,
        tokens=tokens,
        labelled=size * max(longest - 1 if labelled is None else labelled, 1),
        # A mask also separates packed documents.
        padded=packed or tokens > longest or (size > 1 if padded is None else padded),
    )


def _checkpoints(recipe: Recipe) -> bool:
    names = ("gradient_checkpointing", "activation_checkpointing")
    return any(recipe.training.get(name) for name in names)


def _first_use_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    width = config.get_text_config().hidden_size
    if width >= _NARROW_WIDTH:
        return _FIRST_USE_BYTES
    if recipe.dtype != "float32":
        return _FIRST_USE_NARROW_BYTES
    return _FIRST_USE_FLOAT32_BYTES + _FIRST_USE_BYTES_PER_WIDTH * width


def _cublas_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _HOPPER:
        return _CUBLAS_BYTES
    return _CUBLAS_BYTES_HOPPER


def _name(phase: Phase) -> str:
    name, layer = phase
    return f"{BACKWARD[0]} of the layers" if layer is not None or phase == BACKWARD else name
