"""The gradients of embeddings and output head in a planned step, as `TiedEmbedding` and `SlicedVocabulary` treat them.

With a vocabulary of V tokens, hidden size D, T tokens in a batch and R of them with a label, this is what lives beside the
weights. Numbers have the gradient's dtype.

- A head whose gradient is whole: V x D.
- A head whose gradient comes in slices: V x R, the gradient of the logits, and a slice of at most V/8 x D. Of a tied pair the
  former waits until backward reaches the input embedding.
- An input embedding of its own: V x D where its gradient is whole; else 2 T x D, its rows and then the same in order, or, where
  tokens repeat, summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sbft.optim.vocabulary import OuterProduct
from sbft.planning.memory.optimizers import PlannedOptimizer
from sbft.planning.memory.trace import AllocationTrace
from sbft.recipe import Recipe
from sbft.training.loss.cross_entropy import Receiver
from sbft.training.loss.head import Head
from sbft.training.loss.sliced_vocabulary import most_rows, slices_on, uses_of
from sbft.training.peft_models import unwrap


class PlannedVocabulary:
    """What becomes of the gradients of embeddings and head in each step.

    Attributes:
        receiver: what the loss gives the head's gradient to; None if autograd gets it.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        head: Head | None,
        optimizer: PlannedOptimizer,
        trace: AllocationTrace,
        device: str,
    ) -> None:
        self._optimizer, self._trace = optimizer, trace
        self._releases = bool(recipe.optimizer.gradient_release)
        base: Any = unwrap(model)
        embedding = base.get_input_embeddings()
        self._weight = None if head is None else head.linear.weight
        tied = self._weight is not None and isinstance(embedding, nn.Embedding) and embedding.weight is self._weight
        # The trainer joins tied gradients only on a CPU.
        self._tied = embedding if tied and device == "cpu" and embedding.weight.requires_grad else None
        self._product: OuterProduct | None = None
        self.receiver: Receiver | None = None
        self._embedding: nn.Embedding | None = None
        settings = recipe.optimizer
        slices = self._releases and slices_on(settings.sliced_vocabulary, device)
        if head is None or self._weight is None or not slices or settings.cuda_graphs or recipe.distributed is not None:
            return

        def can_be_sliced(weight: Tensor, uses: int) -> bool:
            return weight.requires_grad and uses_of(model, weight) == uses and optimizer.takes_slices(weight)

        most = most_rows(settings.sliced_vocabulary, self._weight.shape[1], device)
        if tied:
            if self._tied is not None and can_be_sliced(self._weight, 2):
                self.receiver = Receiver(self._keep, most)
            return
        if can_be_sliced(self._weight, 1):
            self.receiver = Receiver(self._apply, most)
        if isinstance(embedding, nn.Embedding) and can_be_sliced(embedding.weight, 1):
            self._embedding = embedding

    @contextlib.contextmanager
    def step(self) -> Iterator[Tensor | None]:
        """Around the backward passes of a step; yields what the loss takes as the head's weight."""
        if self._tied is not None:
            with self._of_tied(self._tied) as stand_in:
                yield stand_in
        elif self._embedding is not None:
            with _cut(self._embedding, self._update_rows):
                yield self._weight
        else:
            yield self._weight

    @contextlib.contextmanager
    def _of_tied(self, embedding: nn.Embedding) -> Iterator[Tensor]:
        """The rows that the input embedding read have a separate gradient, and the head's gradient waits for it."""
        weight = embedding.weight
        stand_in = weight.detach().requires_grad_()

        def complete(parameter: Tensor) -> None:
            if parameter.grad is not None:  # it was not handed over
                self._trace.label([parameter.grad], "gradients")

        stand_in.register_post_accumulate_grad_hook(complete)

        def join(rows: Tensor) -> None:
            if self._product is not None:
                self._update(weight, self._product, self._in_order(rows))
                self._product = None

        with _cut(embedding, join):
            yield stand_in
        if stand_in.grad is None:
            return
        # Added up, they are the gradient, in the memory of the head's.
        weight.grad, stand_in.grad = stand_in.grad, None
        if self._releases:
            self._trace.label(self._optimizer.make_state(weight), "optimizer_state")
            weight.grad = None

    def _keep(self, product: OuterProduct) -> None:
        self._trace.label([product.left], "gradients")
        self._product = product

    def _apply(self, product: OuterProduct) -> None:
        assert self._weight is not None
        self._trace.label([product.left], "gradients")
        self._update(self._weight, product, None)

    def _update_rows(self, rows: Tensor) -> None:
        assert self._embedding is not None
        values = self._in_order(rows)
        summed = torch.empty_like(values)
        self._trace.label([summed], "gradients")
        self._update(self._embedding.weight, None, summed)

    def _in_order(self, rows: Tensor) -> Tensor:
        """A copy, by token id."""
        values = torch.empty_like(rows)
        self._trace.label([values], "gradients")
        return values

    def _update(self, weight: Tensor, product: OuterProduct | None, rows: Tensor | None) -> None:
        dtype = product.right.dtype if product is not None else weight.dtype
        self._trace.label(self._optimizer.make_state(weight), "optimizer_state")
        self._optimizer.update_sliced(weight, product, dtype, self._trace)


@contextlib.contextmanager
def _cut(embedding: nn.Embedding, use: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, backward ends at the output of an embedding; `use` is given its gradient."""
    anchor = torch.empty((), requires_grad=True)
    handle = embedding.register_forward_hook(lambda module, args, output: _Cut.apply(anchor, output.detach(), use))
    yield
    handle.remove()


class _Cut(torch.autograd.Function):
    """Returns the same tensor but stops its gradient. (A detached leaf would be kept as long as the graph.)"""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, use: Callable[[Tensor], None]) -> Tensor:
        ctx.use = use
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.use(grad)
        return None, None, None
