"""Avoids gradients of the vocabulary's size: input embedding and output head hand theirs to the optimizer in slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sbft.optim.base import TokenOptimizer
from sbft.optim.vocabulary import OuterProduct, SlicedGradient, TokenRows
from sbft.training.loss.cross_entropy import Receiver
from sbft.training.loss.head import Head
from sbft.training.loss.tied_embeddings import TiedEmbedding, can_be_sliced
from sbft.training.peft_models import unwrap

_COLUMNS_PER_ROW = 8
"""With the default setting. Each pass over the gradient makes it again, which takes longer the more tokens have a label: of an
update of SmolLM2's 49,152 x 576 on one core a tenth more with 63 tokens, and twice as long with 255."""


def slices_on(setting: bool | None, device: str) -> bool:
    """Whether gradients are handed over in slices, by `sliced_vocabulary` and the type of device."""
    return device == "cpu" if setting is None else setting


def most_rows(setting: bool | None, columns: int, device: str) -> int:
    """The most tokens with a label for which a head's gradient, of so many columns, is handed over in slices.

    With half as many tokens as columns the two factors are as large as half the gradient.
    """
    if not slices_on(setting, device):
        return 0
    return columns // (_COLUMNS_PER_ROW if setting is None else 2)


class SlicedVocabulary:
    """Hands gradients of embeddings over in slices (`TokenOptimizer.hand_over`); a context manager around training.

    An untied input embedding hands over the rows that a batch has read. An untied output head is updated within its own
    backward, because nothing else uses it. For a tied pair, the head's part waits for `TiedEmbedding` to add the rows.

    Enter it before gradients are released: the hook that hands over has to run before the hook that updates. Weights with
    further uses keep their plain gradients.

    Args:
        model: the model.
        head: its head.
        optimizer: releases gradients.
        tied: joins the gradients of a tied pair.
        update: updates a parameter whose gradient was handed over.
        most_rows: tokens with a label up to which the head's gradient is handed over.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        optimizer: TokenOptimizer,
        tied: TiedEmbedding,
        update: Callable[[Tensor], None],
        most_rows: int,
    ) -> None:
        self._optimizer, self._update = optimizer, update
        base: Any = unwrap(model)
        embedding = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
        self._embedding: nn.Embedding | None = None
        self._receiver: Receiver | None = None
        self._weight = head.linear.weight
        if tied.takes_slices and uses_of(model, self._weight) == 2:
            self._receiver = Receiver(self._keep, most_rows)
        elif self._can(model, self._weight):
            self._receiver = Receiver(self._apply, most_rows)
        if (
            isinstance(embedding, nn.Embedding)
            and embedding.weight is not self._weight
            and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None)
            and self._can(model, embedding.weight)
        ):
            self._embedding = embedding

    def begin_forward(self) -> Receiver | None:
        """Call it before each forward pass: a hook on a gradient, set since training began, gets the plain one.

        Returns:
            What the loss gives the head's gradient to; None if autograd gets it.
        """
        if self._embedding is not None:
            self._embedding.sparse = not self._embedding.weight._backward_hooks
        return None if self._weight._backward_hooks else self._receiver

    def _can(self, model: nn.Module, weight: Tensor) -> bool:
        return uses_of(model, weight) == 1 and can_be_sliced(weight, self._optimizer)

    def _keep(self, product: OuterProduct) -> None:
        self._optimizer.hand_over(self._weight, SlicedGradient(self._weight.shape, product, None))

    def _apply(self, product: OuterProduct) -> None:
        self._keep(product)
        self._update(self._weight)

    def _take_rows(self, param: Tensor) -> None:
        grad = param.grad
        if grad is None or not grad.is_sparse:  # something else has used the weight too
            return
        self._optimizer.hand_over(param, SlicedGradient(param.shape, None, TokenRows.of(grad)))
        param.grad = None

    def __enter__(self) -> SlicedVocabulary:
        self._handles: list[RemovableHandle] = []
        if self._embedding is not None:
            self._embedding.sparse = True
            self._handles.append(self._embedding.weight.register_post_accumulate_grad_hook(self._take_rows))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if self._embedding is not None:
            self._embedding.sparse = False


def uses_of(model: nn.Module, weight: Tensor) -> int:
    """Number of modules that hold a parameter."""
    return sum(param is weight for module in model.modules() for param in module._parameters.values())
