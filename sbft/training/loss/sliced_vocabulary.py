"""Avoids gradients of the vocabulary's size: input embedding and output head hand theirs to the optimizer in slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sbft.grid.weight import GridWeight
from sbft.optim.base import TokenOptimizer
from sbft.optim.vocabulary import OuterProduct, SlicedGradient, TokenRows
from sbft.training.loss.cross_entropy import Receiver
from sbft.training.loss.head import Head
from sbft.training.loss.tied_embeddings import TiedEmbedding
from sbft.training.peft_models import unwrap


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
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        optimizer: TokenOptimizer,
        tied: TiedEmbedding,
        update: Callable[[Tensor], None],
    ) -> None:
        self._optimizer, self._update = optimizer, update
        base: Any = unwrap(model)
        embedding = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
        self._embedding: nn.Embedding | None = None
        self.receiver: Receiver | None = None
        """Called by the loss with the head's gradient; None if autograd gets it."""
        self._weight = head.linear.weight
        if tied.takes_slices and _uses(model, self._weight) == 2:
            self.receiver = self._keep
        elif self._can(model, self._weight):
            self.receiver = self._apply
        if (
            isinstance(embedding, nn.Embedding)
            and embedding.weight is not self._weight
            and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None)
            and self._can(model, embedding.weight)
        ):
            self._embedding = embedding

    def _can(self, model: nn.Module, weight: Tensor) -> bool:
        usual = type(weight) in (nn.Parameter, GridWeight) and weight.requires_grad
        return usual and _uses(model, weight) == 1 and self._optimizer.takes_slices(weight)

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


def _uses(model: nn.Module, weight: Tensor) -> int:
    """Number of modules that hold a parameter."""
    return sum(param is weight for module in model.modules() for param in module._parameters.values())
