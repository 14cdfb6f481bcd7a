"""How much a batch holds, for averages measured in tokens; and a count of what a model is given, for any training loop."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

if TYPE_CHECKING:
    from sbft.optim.base import TokenOptimizer

logger = logging.getLogger(__name__)

_IDS = "input_ids"
# What TRL's online trainers give a model, joined: prompt and completion lie in tensors of their own.
_GENERATED = ("prompt", "completion")

IN_EXAMPLES = (
    "half-lives are in examples, because batches hold no input_ids or inputs_embeds to count tokens of. What beta2=0.95 is at "
    "batch size 16 is second_moment_half_life=216."
)


class Count(NamedTuple):
    """What a batch holds.

    Attributes:
        number: of tokens, padding aside, or of examples.
        in_tokens: whether it is of tokens.
    """

    number: int
    in_tokens: bool


def count_of(batch: Any) -> Count:
    """The tokens of a batch where it holds some, else its examples; at least 1.

    Tokens are those of `input_ids`, or of `inputs_embeds` of shape (batch, sequence, hidden), less the padding that
    `attention_mask` leaves out; or else of all that ends in `input_ids`, such as `chosen_input_ids`, or of TRL's `prompt_ids`
    and `completion_ids`. Examples are the first dimension of a tensor, or the length of a list.
    """
    tokens = _tokens(batch) if isinstance(batch, Mapping) else None
    if tokens is not None:
        return Count(max(tokens, 1), True)
    return Count(max(_examples(batch) or 1, 1), False)


def _tokens(batch: Mapping[str, Any]) -> int | None:
    if isinstance(batch.get(_IDS), Tensor):
        return _unmasked(batch[_IDS].shape, batch.get("attention_mask"))
    embeds = batch.get("inputs_embeds")
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return _unmasked(embeds.shape[:2], batch.get("attention_mask"))
    masks = {name: name.removesuffix(_IDS) + "attention_mask" for name in batch if str(name).endswith(_IDS)}
    if not masks and all(f"{part}_ids" in batch for part in _GENERATED):
        masks = {f"{part}_ids": f"{part}_mask" for part in _GENERATED}
    found = [
        _unmasked(batch[name].shape, batch.get(mask)) for name, mask in masks.items() if isinstance(batch[name], Tensor)
    ]
    return sum(found) if found else None


def _unmasked(shape: torch.Size, mask: Any) -> int:
    """Positions of a tensor of ids; a mask of two dimensions, or of the ids' own shape, says which are no padding."""
    if isinstance(mask, Tensor) and (mask.dim() == 2 or mask.shape == shape):
        return int(mask.sum())
    return shape.numel()


def _examples(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        return next((size for size in map(_examples_of_column, batch.values()) if size is not None), None)
    if not isinstance(batch, (list, tuple)):
        return None
    columns = {one.shape[0] for one in batch if isinstance(one, Tensor) and one.dim()}
    return columns.pop() if len(columns) == 1 else len(batch)  # inputs and targets; or a list of examples


def _examples_of_column(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else _examples(value)


class TokenCount:
    """Tells an optimizer what a model is given in forward passes of training; made by `TokenOptimizer.count_tokens()`.

    What is counted adds up until the optimizer's `step()`. Passes in eval mode or without gradients are left out. A copy of the
    model does not count.
    """

    def __init__(
        self,
        optimizer: TokenOptimizer,
        model: nn.Module,
        count: Callable[..., int] | None = None,
        process_group: Any = None,
    ) -> None:
        self._optimizer = optimizer
        self.model = model
        hook = _Counting(weakref.ref(optimizer), count, process_group)
        self._handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Count no longer; `tokens_per_step` is to be set by hand again. May be called again."""
        self._handle.remove()
        if self in self._optimizer._counts:
            self._optimizer._counts.remove(self)

    def __enter__(self) -> TokenCount:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Counting:
    """The forward pre-hook. It holds the optimizer weakly, and is not copied with the model: an averaged copy of the weights
    would carry a copy of the optimizer's state."""

    def __init__(self, optimizer: Any, count: Callable[..., int] | None, process_group: Any) -> None:
        self._optimizer = optimizer
        self._count = count
        self._process_group = process_group
        self._said = False

    def __reduce__(self) -> Any:
        return _no_hook, ()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optimizer: TokenOptimizer | None = self._optimizer()
        if optimizer is None or not (model.training and torch.is_grad_enabled()):
            return
        if self._count is not None:
            counted = self._count(*args, **kwargs)
        else:
            counted, in_tokens = count_of(_named(model, args, kwargs))
            if not in_tokens and not self._said:
                self._said = True
                if optimizer.needs_tokens:
                    logger.warning(f"{type(optimizer).__name__}: {IN_EXAMPLES} Or give count_tokens a count of your own.")
        counted = _of_all(counted, (*args, *kwargs.values()), self._process_group)
        optimizer.tokens_per_step = (optimizer.tokens_per_step or 0) + counted


class _NoHook:
    """What is left of a hook in a copy."""

    def __call__(self, *_: Any) -> None:
        return None


def _no_hook() -> _NoHook:
    return _NoHook()


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model was called with, under the names of its forward's parameters."""
    inner: Any = model
    while isinstance(inner, (DistributedDataParallel, DataParallel, OptimizedModule)):
        inner = inner._orig_mod if isinstance(inner, OptimizedModule) else inner.module
    parameters = inspect.signature(inner.forward).parameters.values()
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        return args[0]  # a model that takes the batch as it is
    unnamed = {str(i): one for i, one in enumerate(args[len(names) :])}
    return {**dict(zip(names, args, strict=False)), **unnamed, **kwargs}


def _of_all(counted: int, inputs: tuple[Any, ...], process_group: Any) -> int:
    """The sum over all processes, whose batches differ."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return counted
    if distributed.get_world_size(process_group) == 1:
        return counted
    device = next((one.device for one in inputs if isinstance(one, Tensor)), torch.device("cpu"))
    total = torch.tensor(counted, device=device)
    distributed.all_reduce(total, group=process_group)
    return int(total)
