"""Each optimizer's state, and the temporary memory of its update, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.optimization import Adafactor as TransformersAdafactor

from sbft.native.memory import stored_tensors
from sbft.optim.base import TokenOptimizer
from sbft.optim.kernels import reference, sliced
from sbft.optim.kernels.blocks import GPU_BLOCK_ELEMENTS, Block, move_, weight_matrices
from sbft.optim.matrix import MatrixOptimizer
from sbft.optim.vocabulary import OuterProduct
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

    def takes_slices(self, parameter: Tensor) -> bool:
        """Whether its gradient may come in slices of rows."""
        return self._ours is not None and self._ours.takes_slices(parameter)

    def update_sliced(
        self, parameter: Tensor, product: OuterProduct | None, dtype: torch.dtype, trace: AllocationTrace
    ) -> None:
        """Allocate what an update takes whose gradient comes in slices: one of them, and what works on it.

        Args:
            parameter: a matrix.
            product: that the slices are of; None where they are of a few rows.
            dtype: of the gradient.
            trace: the trace.
        """
        rows, columns = parameter.shape
        in_plain_torch = self._device != "cpu" and self._name == "adafactor"
        height = sliced.height_of_slices(columns, self._device)
        if self._device == "cpu" and self._name == "adafactor":
            if product is None:  # the table of rows is read where it is
                return
            size = sum(tensor.nbytes for tensor in stored_tensors(parameter))
            height = sliced.height_of_compiled_slices(rows, columns, size, torch.get_num_threads())

        def run() -> None:
            memory = torch.empty(min(height, rows), columns, dtype=dtype, device="meta")
            for start in {0, (rows - 1) // height * height}:
                part = memory[: min(height, rows - start)]
                if product is not None:
                    torch.mm(product.left[start : start + height], product.right, out=part)
                if self._name == "sgd":
                    _ = [torch.empty(len(part), dtype=torch.float64, device="meta") for _ in range(2)]  # norms of rows
                if in_plain_torch:
                    self._update_block_in_plain_torch(parameter, part)

        of_product = None if product is None else (product.right.shape, product.left.stride())
        alike = (parameter.shape, type(parameter), parameter.dtype, dtype, of_product, height)
        trace.replay(("sliced", self._name, self._settings.model_dump_json(), alike), run)

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

    def _update_block_in_plain_torch(self, parameter: Tensor, grad: Tensor) -> None:
        """Of Adafactor on a GPU: the update of one block of rows, the first of a slice."""
        rows, columns = grad.shape
        rows = min(rows, max(1, GPU_BLOCK_ELEMENTS // columns))
        block = Block((0, slice(0, rows), slice(0, columns)), 0, rows * columns)
        factors = (torch.empty(1, size, device="meta") for size in grad.shape)
        direction = reference.factored_update(grad[None], *factors)(block)
        key = (0, 0) if self._settings.stochastic_rounding and parameter.dtype == torch.bfloat16 else None
        move_(weight_matrices(parameter), block, direction, torch.empty((), device="meta"), 0.0, key, None)

    def _update_in_plain_torch(self) -> None:
        """Allocate float32 copies of gradient, weight and both moments, and of what decodes moments in 8 bits."""
        for parameter in self._parameters:
            count = 6 if self._in_8_bits(parameter) else 4
            _ = [torch.empty(parameter.shape, dtype=torch.float32) for _ in range(count)]
