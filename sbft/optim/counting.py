"""How many tokens or examples a batch holds, and a count of a model's inputs for any training loop."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

logger = logging.getLogger(__name__)

_IDS = "input_ids"
# TRL's online trainers join prompt and completion, each in a tensor of its own.
_GENERATED = ("prompt", "completion")

IN_EXAMPLES = (
    "half-lives are in examples, because batches hold no input_ids or inputs_embeds to count tokens of. What beta2=0.95 is at "
    "batch size 16 is second_moment_half_life=216."
)


class Count(NamedTuple):
    """Size of a batch.

    Attributes:
        number: number of tokens without padding, or of examples.
        in_tokens: whether tokens were counted.
    """

    number: int
    in_tokens: bool


def count_of(batch: Any) -> Count:
    """Number of tokens in a batch, or of examples where it has no tokens; at least 1.

    Tokens are counted in `input_ids`, or in `inputs_embeds` of shape (batch, sequence, hidden), without the padding that
    `attention_mask` marks. Where a batch has neither, they are counted in all names that end in `input_ids`, such as
    `chosen_input_ids`, or in TRL's `prompt_ids` and `completion_ids`. The number of examples is the first dimension of a
    tensor, or the length of a list.
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
    counts = [
        _unmasked(batch[name].shape, batch.get(mask)) for name, mask in masks.items() if isinstance(batch[name], Tensor)
    ]
    return sum(counts) if counts else None


def _unmasked(shape: torch.Size, mask: Any) -> int:
    """Number of positions in a tensor of ids. A mask with two dimensions, or of the ids' shape, leaves out padding."""
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
    sizes = {item.shape[0] for item in batch if isinstance(item, Tensor) and item.dim()}
    return sizes.pop() if len(sizes) == 1 else len(batch)  # inputs and targets; or a list of examples


def _examples_of_column(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else _examples(value)


class TokenConsumer(Protocol):
    """What a count needs of an optimizer."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the optimizer reads the count."""

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of the coming step so far; None before the first."""

    @tokens_per_step.setter
    def tokens_per_step(self, tokens: int) -> None: ...


class TokenCount:
    """Counts a model's inputs in forward passes of training for an optimizer; made by `TokenOptimizer.count_tokens()`.

    Counts add up until the optimizer's `step()`. Passes in eval mode or without gradients do not count, nor does a copy of the
    model.

    Args:
        optimizer: whose `tokens_per_step` is set.
        model: whose inputs are counted.
        count: counts instead of `count_of`; called with the arguments of forward.
        process_group: processes whose counts are summed; all, if None.
        handles: the optimizer's active counts, which this one leaves on `remove()`.
    """

    def __init__(
        self,
        optimizer: TokenConsumer,
        model: nn.Module,
        count: Callable[..., int] | None = None,
        process_group: Any = None,
        *,
        handles: list[TokenCount],
    ) -> None:
        self._handles = handles
        self.model = model
        hook = _Counting(weakref.ref(optimizer), count, process_group)
        self._handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Stop counting; `tokens_per_step` has to be set by hand again. May be called again."""
        self._handle.remove()
        if self in self._handles:
            self._handles.remove(self)

    def __enter__(self) -> TokenCount:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Counting:
    """The forward pre-hook. It holds the optimizer weakly, and is not copied with the model: an averaged copy of the weights
    would carry a copy of the optimizer's state."""

    def __init__(
        self,
        optimizer: weakref.ref[TokenConsumer],
        count: Callable[..., int] | None,
        process_group: Any,
    ) -> None:
        self._optimizer = optimizer
        self._count = count
        self._process_group = process_group
        self._has_warned = False

    def __reduce__(self) -> Any:
        return _no_hook, ()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        optimizer: TokenConsumer | None = self._optimizer()
        if optimizer is None or not (model.training and torch.is_grad_enabled()):
            return
        if self._count is not None:
            counted = self._count(*args, **kwargs)
        else:
            counted, in_tokens = count_of(_named(model, args, kwargs))
            if not in_tokens and not self._has_warned:
                self._has_warned = True
                if optimizer.needs_tokens:
                    logger.warning(
                        f"{type(optimizer).__name__}: {IN_EXAMPLES} Or give count_tokens a count of your own."
                    )
        counted = _of_all(counted, (*args, *kwargs.values()), self._process_group)
        optimizer.tokens_per_step = (optimizer.tokens_per_step or 0) + counted


class _NoHook:
    """Replaces the hook in a copy of the model."""

    def __call__(self, *_: Any) -> None:
        return None


def _no_hook() -> _NoHook:
    return _NoHook()


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call of a model, by the names of its forward's parameters."""
    inner: Any = model
    while isinstance(inner, (DistributedDataParallel, DataParallel, OptimizedModule)):
        inner = inner._orig_mod if isinstance(inner, OptimizedModule) else inner.module
    parameters = inspect.signature(inner.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        return args[0]  # the model takes the batch as a mapping
    unnamed = {str(i): argument for i, argument in enumerate(args[len(names) :])}
    return {**dict(zip(names, args, strict=False)), **unnamed, **kwargs}


def _of_all(counted: int, inputs: tuple[Any, ...], process_group: Any) -> int:
    """The sum over the processes, whose batches differ."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return counted
    if distributed.get_world_size(process_group) == 1:
        return counted
    device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
    total = torch.tensor(counted, device=device)
    distributed.all_reduce(total, group=process_group)
    return int(total)
