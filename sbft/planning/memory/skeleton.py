"""The model that a recipe would train, on the meta device: shapes without values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sbft.grid.convert import put_on_grids
from sbft.models.scratch import freeze_scales, is_scratch
from sbft.recipe import Recipe
from sbft.recipe.methods import METHODS
from sbft.runs.build import DTYPES, make_trainable
from sbft.training.peft_models import unwrap

_BLOCK, _BLOCKS_OF_SCALES = 64, 256  # elements that share a scale in NF4, and scales that share a scale of scales


def skeleton(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """Make a resolved recipe's model on the meta device, with weights in their storage format, frozen parts and adapters.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        config: of its model.

    Raises:
        SbftError: as `make_trainable` and `put_on_grids`.
    """
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[str(recipe.dtype)], trust_remote_code=recipe.trust_remote_code
        )
        model.tie_weights()
        if is_scratch(recipe.model):
            freeze_scales(model)
        if METHODS[recipe.method].quantization is not None:
            _quantize(model)
        model = make_trainable(model, recipe)
        if recipe.grids is not None:
            put_on_grids(model, recipe.grids)
        return model


def layers_of(model: nn.Module) -> dict[str, int]:
    """The layer number of every parameter in a decoder layer, by the parameter's name."""
    base: Any = unwrap(model)
    count = base.config.get_text_config().num_hidden_layers
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {
                f"{prefix}.{index}.{name}": index
                for index, layer in enumerate(module)
                for name, _ in layer.named_parameters()
            }
    return {}


def period_of_layers(config: PreTrainedConfig, model: nn.Module) -> int | None:
    """After how many layers a decoder's layers repeat; None where they do not, or where no decoder layers are recognised."""
    count = config.get_text_config().num_hidden_layers
    shapes: list[list[Any]] = [[] for _ in range(count)]
    numbers = layers_of(model)
    if not numbers:
        return None
    for name, parameter in model.named_parameters():
        if name in numbers:
            index = numbers[name]
            shapes[index].append((name.split(f".{index}.", 1)[1], parameter.shape, parameter.requires_grad))
    for values in _of_each_layer(config).values():
        for index, value in enumerate(values):
            shapes[index].append(value)
    return next((n for n in range(1, count // 2 + 1) if all(shapes[i] == shapes[i - n] for i in range(n, count))), None)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of the same model with only its first `layers` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for name, values in _of_each_layer(config).items():
        setattr(text, name, values[:layers])
    text.num_hidden_layers = layers
    return short


def _of_each_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """A config's settings with one value per layer, such as the kind of attention."""
    text = config.get_text_config()
    return {
        name: list(value)
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers
    }


class _Linear4bit(nn.Linear):
    """A replacement for a layer of bitsandbytes with as many bytes and the same tensors in forward and backward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        self.computes_in = linear.weight.dtype
        self.bias = linear.bias
        elements = linear.weight.numel()
        # Two elements per byte, then the scales in bytes, then the scales of scales in float32.
        self.weight = nn.Parameter(torch.empty((elements + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        scales = -(-elements // _BLOCK)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-scales // _BLOCKS_OF_SCALES), dtype=torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer's."""
        result: Tensor = _Product4bit.apply(input.to(self.computes_in), self.weight, self.out_features)
        return result if self.bias is None else result + self.bias


class _Product4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.out_features = out_features
        return F.linear(input, input.new_empty(out_features, input.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dequantized = grad.new_empty(ctx.out_features, 2 * weight.numel() // ctx.out_features)
        return grad @ dequantized, None, None


def _quantize(model: PreTrainedModel) -> None:
    """Replace every linear layer but the output head, as transformers does with bitsandbytes."""
    head = model.get_output_embeddings()
    for parent, name, linear in list(_linears(model)):
        if linear is not head:
            setattr(parent, name, _Linear4bit(linear))


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child
