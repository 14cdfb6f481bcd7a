"""Batches of any kind: what the optimizer is told that they hold, and inputs in the dtype that weights were cast to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer

from sbft.optim.base import TokenOptimizer
from sbft.optim.counting import IN_EXAMPLES, Count
from sbft.training.batch_counts import count_in

logger = logging.getLogger(__name__)

# Words in the names of inputs that are compared with what the model gives, and so keep their precision.
_TARGETS = ("label", "target", "future")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CountedBatches(_Base):
    """Put before a `Trainer`: the tokens of a step, or its examples where it holds no tokens, reach the optimizer.

    A batch that is a list of examples, such as the prompts of TRL's GRPO, is counted once the trainer beneath has made inputs
    of it, which hold the completions too.
    """

    _step_tokens: int
    _in_training_step: bool
    _counts_prepared = False
    _said_examples = False

    @property
    def _token_optimizer(self) -> TokenOptimizer | None:
        raise NotImplementedError  # abstract

    def _count_step(self, batches: list[Any]) -> None:
        """Count the batches of the coming step, or leave that until they are prepared."""
        self._step_tokens = 0
        self._counts_prepared = not all(isinstance(batch, Mapping) or _is_tensors(batch) for batch in batches)
        if not self._counts_prepared:
            self._add_to_step([count_in(batch) for batch in batches])

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in `Trainer`."""
        prepared = super()._prepare_inputs(inputs)
        if self._in_training_step and self._counts_prepared:
            self._add_to_step([count_in(prepared)])
        return prepared

    def _add_to_step(self, counts: list[Count]) -> None:
        tokens = sum(one.number for one in counts)
        if self.accelerator.num_processes > 1:
            tokens = int(self.accelerator.gather(torch.tensor(tokens, device=self.args.device)).sum())
            tokens //= self.get_tp_size()  # these ranks have the same examples
        self._step_tokens += max(tokens, 1)
        optimizer = self._token_optimizer
        if optimizer is None:
            return
        optimizer.tokens_per_step = self._step_tokens
        if not (self._said_examples or all(one.in_tokens for one in counts)):
            self._said_examples = True
            if optimizer.needs_tokens:
                logger.warning(f"token_optimizer {type(optimizer).__name__}: {IN_EXAMPLES}")


def _is_tensors(batch: Any) -> bool:
    return isinstance(batch, Tensor) or (
        isinstance(batch, (list, tuple)) and len(batch) > 0 and all(isinstance(one, Tensor) for one in batch)
    )


def beside_statistics(model: nn.Module) -> set[Tensor]:
    """Weights of batch norms, which torch takes in the dtype of their running statistics alone: float32."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}


def cast_inputs(model: nn.Module, dtype: torch.dtype, labels: Iterable[str] = ()) -> None:
    """Have a model, whose weights were cast, take float32 inputs as before: pixels, sound, embeddings.

    What is compared with the model's output keeps its precision, as do tensors with less than two dimensions, such as counts.

    Args:
        model: its forward gets inputs cast from then on; a copy of it too.
        dtype: of its weights.
        labels: names of inputs that are compared, beside those that say so.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _CastInputs):
            return
    model.register_forward_pre_hook(_CastInputs(dtype, frozenset(labels)), with_kwargs=True)


class _CastInputs:
    """The forward pre-hook."""

    def __init__(self, dtype: torch.dtype, labels: frozenset[str]) -> None:
        self._dtype = dtype
        self._labels = labels

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = {name: one if self._is_target(name) else self._cast(one, "mask" in name) for name, one in kwargs.items()}
        return tuple(self._cast(one) for one in args), cast

    def _is_target(self, name: str) -> bool:
        return name in self._labels or any(word in name for word in _TARGETS)

    def _cast(self, value: Any, is_mask: bool = False) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in (torch.float32, torch.float64) or value.dim() < 2:
                return value
            if is_mask:  # whose lowest number would become -inf, and a row of nothing else NaN after softmax
                value = value.clamp(torch.finfo(self._dtype).min, torch.finfo(self._dtype).max)
            return value.to(self._dtype)
        if type(value) in (list, tuple):
            return type(value)(self._cast(one, is_mask) for one in value)
        return value
