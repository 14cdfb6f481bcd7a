"""Tied input and output embeddings: backward makes one gradient table for them instead of three."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sbft.grid.weight import GridWeight
from sbft.optim.base import TokenOptimizer
from sbft.optim.vocabulary import SlicedGradient
from sbft.training.loss.head import Head
from sbft.training.peft_models import unwrap


def can_be_sliced(weight: Tensor, optimizer: TokenOptimizer) -> bool:
    """Whether a weight's gradient may reach its optimizer in slices: whoever hooks the weight gets a plain gradient."""
    usual = type(weight) in (nn.Parameter, GridWeight) and weight.requires_grad
    hooked = bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)
    return usual and not hooked and optimizer.takes_slices(weight)


class TiedEmbedding:
    """Adds a tied input embedding's gradient to the head's, row by row; a context manager around training.

    Autograd makes the head's gradient, a second whole table for the few rows that the input embedding has used, and a third for
    their sum (SmolLM2-135M on two cores at 40 tokens: 49 of 430 ms of backward, and twice 54 MiB). Here the head's gradient is
    held until the input embedding's sparse gradient arrives, which is added to it in place.

    Where an optimizer takes slices, even that table is not made: the optimizer got the head's gradient as a product in the
    head's backward (`hand_over`), and the rows are added to it.

    Enter it before gradients are released: the hook that joins the two has to run before the hooks that use the gradient.
    """

    def __init__(self, model: nn.Module, head: Head, optimizer: TokenOptimizer | None = None) -> None:
        base = unwrap(model)
        weight = head.linear.weight
        embedding = base.get_input_embeddings() if isinstance(base, PreTrainedModel) else None
        self._embedding: nn.Embedding | None = None
        self._weight = weight
        self._head_weight: Tensor | None = None
        # Only on a CPU: elsewhere adding rows in place is not deterministic, and a resumed run would not end in the same bits.
        # A plain weight or one on a grid: sharded and otherwise quantized tensors may not support sparse gradients.
        if (
            weight.device.type == "cpu"
            and isinstance(embedding, nn.Embedding)
            and embedding.weight is weight
            and type(weight) in (nn.Parameter, GridWeight)
        ):
            self._embedding = embedding
        self.takes_slices = self._embedding is not None and optimizer is not None and can_be_sliced(weight, optimizer)
        self._optimizer = optimizer

    def head_weight(self) -> Tensor:
        """The tensor that the loss of one backward uses as the head's weight."""
        if self._embedding is None or not self._embedding.sparse or not self._weight.requires_grad:
            return self._weight
        self._head_weight = self._weight.detach().requires_grad_()
        return self._head_weight

    def _join(self, param: Tensor) -> None:
        head = None if self._head_weight is None else self._head_weight.grad
        self._head_weight = None
        grad = param.grad
        if grad is None or (head is None and not grad.is_sparse):
            return
        if head is None and self.takes_slices:
            assert self._optimizer is not None
            of_head = self._optimizer.handed_over(param)
            gradient = SlicedGradient(param.shape, None, None) if of_head is None else of_head
            self._optimizer.hand_over(param, gradient.with_rows(grad))
            param.grad = None
        elif head is None:
            param.grad = grad.to_dense()
        elif grad.is_sparse:
            # Not `head + sparse`: that copies the whole table first.
            param.grad = head.index_add_(0, grad._indices()[0], grad._values())
        else:  # it also holds the gradient of an earlier micro-batch
            grad.add_(head)

    def __enter__(self) -> TiedEmbedding:
        if self._embedding is not None and self._weight.requires_grad and not self._embedding.sparse:
            self._embedding.sparse = True
            self._handle = self._weight.register_post_accumulate_grad_hook(self._join)
        else:
            self._embedding = None
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._embedding is not None:
            self._embedding.sparse = False
            self._handle.remove()
