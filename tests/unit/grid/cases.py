"""Models with weights on a grid, and the same models in bfloat16."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from sbft.grid.convert import put_on_grids
from sbft.grid.formats import GRIDS
from sbft.grid.weight import GridWeight
from tests.tiny import tiny_model

FORMATS = tuple(GRIDS)
MODELS = ("llama", "llama tied", "qwen3", "gemma3", "gpt2", "moe eager", "moe grouped_mm", "moe batched_mm")


def pair(shape: tuple[int, ...] = (96, 64), form: str = "int8", seed: int = 0) -> tuple[GridWeight, nn.Parameter]:
    """A parameter on a grid, and a plain one with the same values."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight: GridWeight = nn.Parameter(GridWeight.of(values, GRIDS[form]))  # type: ignore[assignment]
    return weight, nn.Parameter(weight.dequantize())


def bfloat16_model(kind: str, **settings: int) -> PreTrainedModel:
    """A tiny model of `tests.tiny`, `tied` or not, or a mixture of experts with one of transformers' expert products."""
    name, _, how = kind.partition(" ")
    if name != "moe":
        return tiny_model(name, tied=True if how == "tied" else None, **settings)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation=how or "eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).to(torch.bfloat16)


def grid_model(kind: str, form: str = "int8", smallest_elements: int = 1, **settings: int) -> PreTrainedModel:
    """The same model, with every weight on a grid that can be on one."""
    model = bfloat16_model(kind, **settings)
    put_on_grids(model, form, smallest_elements=smallest_elements)
    return model


def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights on a grid are plain parameters of the same values; tied ones stay tied."""
    copied = copy.deepcopy(model)
    plain: dict[int, nn.Parameter] = {}
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, GridWeight):
                made = nn.Parameter(parameter.dequantize(), requires_grad=parameter.requires_grad)
                module._parameters[name] = plain.setdefault(id(parameter), made)
    return copied


def tokens(count: int = 12, seed: int = 1) -> Tensor:
    """Token ids, (1, count)."""
    return torch.randint(0, 512, (1, count), generator=torch.Generator().manual_seed(seed))


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the tensors that store a model's weights, by `NAME.PART`: codes and scales of those on a grid."""
    return {
        f"{name}.{part}": tensor.detach().clone()
        for name, parameter in model.named_parameters()
        for part, tensor in (parameter.quantized.tensors if isinstance(parameter, GridWeight) else {"": parameter}).items()
    }
