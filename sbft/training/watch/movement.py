"""Samples how many weights a step changes, detects a run that changes none, and names the likely cause."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sbft.grid.codes import elements
from sbft.grid.weight import GridWeight
from sbft.optim.base import TokenOptimizer
from sbft.training.peft_models import unwrap

# Every `SAMPLE_EVERY` steps the larger half of `_CANDIDATES` weights of each of `_PARAMETERS` parameters is compared.
SAMPLE_EVERY, SAMPLES = 4, 8
_PARAMETERS, _CANDIDATES = 8, 1024
_GOLDEN_RATIO = 0.6180339887498949
# The share of the larger half of weights that one step changes. SmolLM2-135M with Adafactor at batch size 1, bfloat16 rounded
# to nearest: 0 of 160,000 at a rate of 3e-5 and 1e-4, 0.003 % at 3e-4, 0.8 % at 1e-3. Rounded stochastically: 0.26 % at 3e-5,
# 0.87 % at 1e-4. That is proportional to the rate and correct in expectation however small, so only no change at all is a
# stall. In float32: over 99 %. Of all weights, rounding to nearest at 1e-4 changes 2.2 %, always the same ones near zero.
_STALLED_BELOW = 1e-3
# A bfloat16 has 8 significant bits: its neighbours differ by 2**-8 to 2**-7 of it, and half of that is rounded off.
_HALF_SPACING = "0.2 to 0.4 %"
# Optimizers of these packages round bfloat16 weights to nearest.
_ROUND_TO_NEAREST = ("torch", "transformers", "bitsandbytes")


class MovementWatch:
    """Samples the share of weights that one step changes, among the larger half of a few large parameters.

    For a weight on a grid, it compares values on the grid: code times scale.

    It is the larger half, because weights near zero change under any rounding. Word embeddings are left out if there are
    other parameters, because most of their rows have no gradient in a step. The positions follow a fixed sequence, so that
    no random state is needed.

    Args:
        model: its trainable parameters are initialized and on their device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sampled = [(parameter, _larger_half(parameter)) for parameter in _large_parameters(model)]
        self._before: list[Tensor] | None = None
        self.elements = sum(positions.numel() for _, positions in self._sampled)
        self.bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter, _ in self._sampled)
        self.on_grid = any(isinstance(parameter, GridWeight) for parameter, _ in self._sampled)

    def before_step(self) -> None:
        """Copy the sampled weights."""
        self._before = [_values_at(parameter, positions) for parameter, positions in self._sampled]

    def discard(self) -> None:
        """Discard the copy."""
        self._before = None

    def after_step(self) -> Tensor | None:
        """How many sampled weights have changed since `before_step`: shape (), on their device; None without a copy."""
        before, self._before = self._before, None
        if not before:
            return None
        changed = [
            (_bits(old) != _bits(_values_at(parameter, positions))).sum()
            for old, (parameter, positions) in zip(before, self._sampled, strict=True)
        ]
        # Not from a GPU to the host without waiting; offloaded weights are in the host's memory, beside others on a GPU.
        device = next((count.device for count in changed if count.device.type != "cpu"), changed[0].device)
        return torch.stack([count.to(device, non_blocking=True) for count in changed]).sum()


def _large_parameters(model: nn.Module) -> list[Tensor]:
    """Up to `_PARAMETERS` parameters of at least half the size of the largest, spread over the model."""
    inner = transformers_model(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = None if inner is None else inner.get_output_embeddings()
    if head is not None:
        embeddings.update(id(parameter) for parameter in head.parameters())
    # Only plain tensors and those on a grid: reading elements of a sharded one would need all ranks.
    trainable = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.is_floating_point() and type(parameter.detach()) in (Tensor, GridWeight)
    ]
    candidates = [parameter for parameter in trainable if id(parameter) not in embeddings] or trainable
    largest = max((parameter.numel() for parameter in candidates), default=0)
    large = [parameter for parameter in candidates if 2 * parameter.numel() >= largest > 0]
    count = min(_PARAMETERS, len(large))
    return [large[i * len(large) // count] for i in range(count)]


def _larger_half(parameter: Tensor) -> Tensor:
    """Positions (int64, in the flattened parameter) of the larger half of up to `_CANDIDATES` elements spread over it."""
    count = min(_CANDIDATES, parameter.numel())
    positions = torch.arange(count)
    if count < parameter.numel():
        # Multiples of the golden ratio, modulo one: evenly spread, and not aligned with any row length.
        spread = positions.double().add_(1.0).mul_(_GOLDEN_RATIO).remainder_(1.0)
        positions = spread.mul_(parameter.numel()).long()
    positions = positions.to(parameter.device)
    size = _values_at(parameter, positions).float().abs()
    return positions[size.topk(max(count // 2, 1)).indices]


def _values_at(parameter: Tensor, positions: Tensor) -> Tensor:
    """A copy of some elements of a parameter, by their positions in the flattened one: (positions,)."""
    if isinstance(parameter, GridWeight):
        return elements(parameter.quantized, positions)
    return parameter.detach().take(positions)


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def transformers_model(model: nn.Module) -> PreTrainedModel | None:
    """The model, or the one inside a PEFT model, if it is a transformers model; else None."""
    inner = unwrap(model)
    return inner if isinstance(inner, PreTrainedModel) else None


def is_stall(share: float, optimizer: torch.optim.Optimizer, bfloat16: bool, on_grid: bool = False) -> bool:
    """Whether the weights are stuck if a step changes this share of them, on average over several samples.

    On a grid, stochastic rounding changes few weights. At 1e-5 with 4 bits it is one in 30,000, as many as are sampled.
    """
    if on_grid and not _rounds_to_nearest(optimizer):
        return share == 0 and _has_no_gradient(optimizer)
    return share == 0 or (share < _STALLED_BELOW and (not bfloat16 or _rounds_to_nearest(optimizer)))


def _has_no_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, TokenOptimizer) and optimizer.grad_norm is not None and not optimizer.grad_norm


def _rounds_to_nearest(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this optimizer is known to round bfloat16 weights to nearest."""
    if isinstance(optimizer, TokenOptimizer):
        return not any(group["stochastic_rounding"] for group in optimizer.param_groups)
    return type(optimizer).__module__.partition(".")[0] in _ROUND_TO_NEAREST


def message_of_stall(
    share: float, step: int, optimizer: torch.optim.Optimizer, rate: float, bfloat16: bool, on_grid: bool = False
) -> str:
    """What does not move, the likely cause, and what to set; `rate` is the peak learning rate."""
    observation = (
        f"The weights hardly move: of those sampled (the larger half of some weights of the largest layers), a step "
        f"changes {share:.2%}, measured {SAMPLES} times up to step {step}."
    )
    if _has_no_gradient(optimizer):
        cause = (
            "Likely cause: the gradient is zero, because the loss does not depend on them. Check whether the examples "
            "have labels other than -100, and whether the model's outputs are detached."
        )
    elif on_grid and _rounds_to_nearest(optimizer):
        cause = (
            "Likely cause: the weights are on a grid and stochastic_rounding is off, so an update below half the grid's "
            f"spacing is rounded off, and at learning_rate {rate:g} most of them are. Set stochastic_rounding to true "
            "(in a recipe, optimizer: {stochastic_rounding: true})."
        )
    elif bfloat16 and _rounds_to_nearest(optimizer):
        lost = f"an update below {_HALF_SPACING} of a weight is rounded off, and at learning_rate {rate:g} most of them are"
        if isinstance(optimizer, TokenOptimizer):
            cause = (
                f"Likely cause: the weights are bfloat16 and stochastic_rounding is off, so {lost}. Set "
                "stochastic_rounding to true (in a recipe, optimizer: {stochastic_rounding: true})."
            )
        else:
            cause = (
                f"Likely cause: the weights are bfloat16 and {type(optimizer).__name__} rounds to nearest, so {lost}. "
                'Use an optimizer that rounds stochastically (token_optimizer="adafactor"; in a recipe, method: sbft), '
                "or load the model in float32 (in a recipe, dtype: float32)."
            )
    else:
        cause = f"Likely cause: learning_rate {rate:g} is too small. Raise it tenfold or more."
    return f"{observation} {cause}"
