"""Each optimizer's state, and the temporary memory of its update, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.optimization import Adafactor as TransformersAdafactor

from sbft.optim.base import TokenOptimizer
from sbft.optim.matrix import MatrixOptimizer
from sbft.planning.memory.trace import AllocationTrace
from sbft.recipe import Recipe
from sbft.recipe.methods import METHODS
from sbft.recipe.settings import settings_in
from sbft.training.token_optimizers import TOKEN_OPTIMIZERS, parameter_groups

_OF_TRAINER = {name for name, setting in settings_in("optimizer").items() if setting.of_trainer}
# bitsandbytes' 8-bit optimizers: tensors below this size stay in 32 bits, and this many elements share a scale.
_SMALLEST_IN_8_BITS, _BLOCK = 4096, 256


class PlannedOptimizer:
    """The optimizer of a resolved recipe on its model's parameters on the meta device.

    sbft's optimizers update one parameter at a time and torch's fused AdamW all of them, in place: they allocate next to
    nothing, except a matrix optimizer's temporaries for one matrix. transformers' Adafactor is actually run.
    """

    def __init__(self, recipe: Recipe, model: PreTrainedModel, device: str) -> None:
        self._device = device
        self._name = METHODS[recipe.method].optimizer
        self._settings = recipe.optimizer
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # In the order of the Trainer's groups, with weight decay first: each update keeps temporaries of the one before.
        self._parameters = sorted(trainable, key=lambda parameter: parameter.dim() < 2)
        self._of_embeddings = {
            module.weight
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.weight is not None
        }
        self._ours = self._make_ours(model) if self._name in TOKEN_OPTIMIZERS else None
        groups = [] if self._ours is None else self._ours.param_groups
        self._group_of = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
        # As transformers' Trainer makes it.
        self._transformers: Any = (
            TransformersAdafactor(self._parameters, lr=1e-5, scale_parameter=False, relative_step=False)
            if self._name == "transformers_adafactor"
            else None
        )
        self._adam: dict[Tensor, list[Tensor]] = {}

    def make_state(self, parameter: Tensor) -> list[Tensor]:
        """The state of a parameter from its first update on."""
        if self._ours is not None:
            self._ours.initialize_state(parameter)
            state = list(self._ours.state[parameter].values())
        elif self._transformers is not None:
            state = list(self._transformers.state[parameter].values())  # made by its first update
        else:
            if parameter not in self._adam:
                self._adam[parameter] = list(self._adam_state(parameter))
            state = self._adam[parameter]
        return [tensor for tensor in state if isinstance(tensor, Tensor)]

    def update_one(self, parameter: Tensor, trace: AllocationTrace) -> None:
        """Allocate the temporaries of one parameter's update; its gradient exists already."""
        optimizer, grad = self._ours, parameter.grad
        if not isinstance(optimizer, MatrixOptimizer) or grad is None:
            return

        def run() -> None:
            for _ in optimizer.directions(parameter, grad, torch.ones((), dtype=torch.bool)):
                pass

        alike = (parameter.shape, parameter.dtype, grad.dtype, grad.stride(), self._group_of[parameter])
        trace.replay((self._name, self._settings.model_dump_json(), alike), run)

    def update(self, trace: AllocationTrace) -> None:
        """Allocate the temporaries of updating all parameters; their gradients exist already."""
        if self._transformers is not None:
            if self._device == "cpu":  # its second step replaces tensors of its first
                self._transformers.step()
            else:
                alike = tuple((parameter.shape, parameter.dtype) for parameter in self._parameters)
                trace.replay((self._name, alike), self._transformers.step)
        elif self._ours is not None:
            for parameter in self._parameters:
                self.update_one(parameter, trace)
        elif self._name == "bitsandbytes_adamw8bit" and self._device == "cpu":
            self._update_in_plain_torch()

    def _make_ours(self, model: PreTrainedModel) -> TokenOptimizer:
        settings = self._settings.model_dump(exclude_none=True, exclude=_OF_TRAINER)
        kind = TOKEN_OPTIMIZERS[self._name]
        optimizer = kind(parameter_groups(model, kind), **settings)
        optimizer.tokens_per_step = 1
        return optimizer

    def _in_8_bits(self, parameter: Tensor) -> bool:
        return (
            self._name == "bitsandbytes_adamw8bit"
            and parameter.numel() >= _SMALLEST_IN_8_BITS
            and parameter not in self._of_embeddings
        )

    def _adam_state(self, parameter: Tensor) -> Iterator[Tensor]:
        if self._in_8_bits(parameter):
            for _ in range(2):
                yield torch.empty(parameter.shape, dtype=torch.uint8)
                yield torch.empty(-(-parameter.numel() // _BLOCK), dtype=torch.float32)
            return
        dtype = torch.float32 if self._name == "bitsandbytes_adamw8bit" else parameter.dtype
        for _ in range(2):
            yield torch.empty(parameter.shape, dtype=dtype)
        if self._name != "bitsandbytes_adamw8bit":  # which counts its steps in a plain number
            yield torch.empty((), dtype=torch.float32)

    def _update_in_plain_torch(self) -> None:
        """Allocate float32 copies of gradient, weight and both moments, and of what decodes moments in 8 bits."""
        for parameter in self._parameters:
            count = 6 if self._in_8_bits(parameter) else 4
            _ = [torch.empty(parameter.shape, dtype=torch.float32) for _ in range(count)]
