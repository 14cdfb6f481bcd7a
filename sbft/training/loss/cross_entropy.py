"""Cross entropy of a linear head that makes its logits in pieces of a limited size.

If the logits of all rows fit into one piece (fine-tuning on completions), they are made once, and their gradient is kept in the
head's own dtype. Otherwise the vocabulary is cut into slices: forward keeps one number per row, and backward makes each slice
again. It is the vocabulary that is cut and not the rows, because the weight gradient of a slice is then complete after one
product. It needs no float32 accumulator of the head's size and is not rounded once per chunk.

A head on a grid (`sbft.grid`) is read in pieces of its rows, so that no more than a piece of it is dense at any time. Its
logits are still made once where they fit; only the gradient of the hidden states is then a float32 sum over the pieces.

torch 2.13's own `linear_cross_entropy` is not used. Its chunked form takes 13 to 100 times as long on a CPU in bfloat16
(49152 x 576, 1 to 40 rows) and 486 MiB instead of 54, and its plain form makes all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sbft.grid.tensor import GridTensor
from sbft.native.device_type import device_type
from sbft.native.huge_pages import in_huge_pages
from sbft.optim.vocabulary import OuterProduct
from sbft.training.loss.token_statistics import StatisticsOfSlices, TokenStatistics

# 64 MiB of float32, 341 rows of a 49152-token vocabulary. One piece needs three products of the head's size, and slices need
# four: 52 against 73 ms for 40 rows on two cores.
PIECE_ELEMENTS = 2**24
# A slice that fits in a CPU's cache is faster: of 512 rows, 390 against 590 ms with slices of 64 MiB (49152 x 576, one core of
# an EPYC). On a GPU, many slices would be many launches.
_SLICE_ELEMENTS, _GPU_SLICE_ELEMENTS = 2**21, 2**23
_SMALLEST_SLICE = 256
# 8 MiB of bfloat16, and where launching costs more than memory 32.
DENSE_ELEMENTS, GPU_DENSE_ELEMENTS = 2**22, 2**24
"""Of a head on a grid, how many weights are dense at once."""


@dataclass(frozen=True)
class Receiver:
    """Takes the gradient of a head, which autograd then does not get."""

    take: Callable[[OuterProduct], None]
    """Called in backward. It may change the head's weight."""
    most_rows: int
    """Of hidden states. With more of them autograd gets the gradient."""


@dataclass(frozen=True)
class VocabularyPart:
    """One rank's rows of a head whose vocabulary is sharded over several ranks."""

    start: int
    """Token id of the first row."""
    gather: Callable[[Tensor], Tensor]
    """Makes from a tensor of shape (numbers, rows) on each rank one of shape (numbers, ranks, rows), the same on all."""
    all_reduce: Callable[[Tensor], object]
    """Replaces a tensor by its sum over the ranks."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: Tensor | float | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    counted: Tensor | None = None,
    piece_elements: int = PIECE_ELEMENTS,
    weight_elements: int | None = None,
    part: VocabularyPart | None = None,
    statistics: TokenStatistics | None = None,
    receiver: Receiver | None = None,
) -> Tensor:
    """Sum of the cross entropies of `softcap(scale * (hidden @ weight.T + bias))` and `labels`, divided by `num_items`.

    Products are computed in the dtype of `weight` (under autocast, in its dtype), and everything after them in float32.

    Args:
        hidden: (rows, hidden size), only rows that have a label; else `counted` says which have one.
        weight: (vocabulary, hidden size), the head.
        labels: (rows,) int64 in [0, vocabulary).
        bias: (vocabulary,), of the head.
        num_items: divides the sum; None: the number of rows that count. A tensor of shape () causes no synchronisation.
        scale: the logits are multiplied by it.
        softcap: a logit `x` becomes `softcap * tanh(x / softcap)`.
        counted: (rows,) bool, if not all rows count. The logits of the others are made too, so that the host need not wait to
            learn how many there are. Their labels are ignored.
        piece_elements: most logits that are made in one piece. If there are more, the vocabulary is cut into smaller slices.
        weight_elements: most elements of `weight` that one product reads; None: a few MiB of one on a grid, else all.
        part: which rows of the vocabulary `weight` and `bias` are, if it is sharded. `hidden` and `labels` are the same on all
            ranks.
        statistics: filled in, which costs a few passes over the logits.
        receiver: takes the gradient of `weight` as a product, in place of autograd; not under autocast.

    Returns:
        float32 of shape (); differentiable once with respect to `hidden`, `weight` and `bias`.

    Raises:
        RuntimeError: a label is not in the vocabulary.
    """
    if num_items is None:
        num_items = float(hidden.shape[0]) if counted is None else counted.sum()
    if isinstance(num_items, Tensor):
        weight_of_row: Tensor | float = num_items.to(hidden.device, torch.float32).clamp(min=1).reciprocal()
    else:
        weight_of_row = 1.0 / max(num_items, 1.0)
    if counted is not None:
        weight_of_row = counted.unsqueeze(1) * torch.as_tensor(weight_of_row, dtype=torch.float32)
        labels = labels.where(counted, 0)
        hidden = hidden.masked_fill(~counted.unsqueeze(1), 0.0)  # an infinite value there, times zero, would be NaN
    dtype = weight.dtype
    device = device_type(weight)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(
        hidden.to(dtype),
        weight.to(dtype),
        bias,
        labels,
        weight_of_row,
        scale,
        softcap,
        piece_elements,
        _rows_at_once(weight, weight_elements),
        part,
        torch.is_grad_enabled(),
        None if statistics is None else StatisticsOfSlices(statistics, counted),
        receiver
        if receiver is not None and part is None and weight.dtype == dtype and hidden.shape[0] <= receiver.most_rows
        else None,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weight_of_row: Tensor | float,
        scale: float,
        softcap: float | None,
        piece_elements: int,
        weight_rows: int,
        part: VocabularyPart | None,
        needs_grad: bool,
        gathered: StatisticsOfSlices | None,
        receiver: Receiver | None,
    ) -> Tensor:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        ctx.has_bias = bias is not None
        ctx.settings = (weight_of_row, scale, softcap)
        ctx.part, ctx.weight_rows, ctx.receiver = part, weight_rows, receiver
        if part is None and rows * vocabulary <= piece_elements:
            loss, grad_logits = _one_piece(
                hidden, weight, bias, labels, weight_of_row, scale, softcap, needs_grad, gathered, weight_rows
            )
            if needs_grad:
                ctx.slice_size = None
                ctx.save_for_backward(hidden, weight, grad_logits)
            return loss
        if part is not None:
            labels = labels - part.start
        elements = min(piece_elements, _SLICE_ELEMENTS if device_type(weight) == "cpu" else _GPU_SLICE_ELEMENTS)
        slice_size = min(max(_SMALLEST_SLICE, elements // max(rows, 1)), weight_rows)
        log_sum = torch.full((rows,), -torch.inf, device=hidden.device)
        of_label, is_there = torch.zeros(2, rows, device=hidden.device)
        for start in _starts(weight, slice_size):
            logits, _ = _logits(hidden, weight, bias, start, slice_size, scale, softcap)
            logits = logits.float()
            index, inside = _labels_in_slice(labels, start, logits.shape[1])
            of_label += logits.gather(1, index).squeeze(1) * inside
            is_there += inside
            of_slice = logits.logsumexp(1)
            if gathered is not None:
                gathered.add_slice(logits, of_slice, labels - start)
            log_sum = torch.logaddexp(log_sum, of_slice)
            del logits  # before the next slice is made
        if part is not None:
            message = [log_sum, of_label, is_there, *(() if gathered is None else gathered.of_this_rank())]
            log_sums, of_labels, are_there, *rest = part.gather(torch.stack(message))
            log_sum, of_label, is_there = log_sums.logsumexp(0), of_labels.sum(0), are_there.sum(0)
            if gathered is not None:
                gathered.join(log_sums, *rest)
        if hidden.device.type != "meta":
            # Async, so that the host does not wait for the device.
            torch._assert_async((is_there == 1).all(), "a label is not in the vocabulary")
        if gathered is not None:
            gathered.finish(log_sum)
        if needs_grad:
            ctx.slice_size = slice_size
            ctx.save_for_backward(hidden, weight, labels, log_sum, *(() if bias is None else (bias,)))
        return _total((log_sum - of_label).unsqueeze(1), weight_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        receiver: Receiver | None = ctx.receiver if needs_weight else None
        needs_weight = needs_weight and receiver is None
        grads: tuple[Tensor | None, ...]
        if ctx.slice_size is None:
            hidden, weight, grad_logits = ctx.saved_tensors
            grad_logits = grad_logits * grad_loss
            grads = (
                _hidden_gradient(grad_logits, weight, ctx.weight_rows) if needs_hidden else None,
                _weight_gradient(grad_logits, hidden, weight) if needs_weight else None,
                grad_logits.sum(0) if needs_bias else None,
            )
            product = None if receiver is None else OuterProduct(_by_token_id(grad_logits, hidden).T, hidden)
        else:
            needs_product = receiver is not None
            grads, product = _sliced_gradients(ctx, grad_loss, needs_hidden, needs_weight, needs_bias, needs_product)
        if receiver is not None and product is not None:
            receiver.take(product)
        return (*grads, *([None] * 10))


def _one_piece(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight_of_row: Tensor | float,
    scale: float,
    softcap: float | None,
    needs_grad: bool,
    gathered: StatisticsOfSlices | None,
    weight_rows: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the head's own output, (rows, vocabulary) in its dtype."""
    logits, tanh = _logits(hidden, weight, bias, 0, weight.shape[0], scale, softcap, weight_rows)
    log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
    index = labels.unsqueeze(1)
    if gathered is not None:
        gathered.of_all(logits, log_probabilities, labels)
    loss = _total(log_probabilities.gather(1, index).neg_(), weight_of_row)
    if not needs_grad:
        return loss, logits
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
    return loss, _through_head(grad, tanh, weight_of_row, scale).to(hidden.dtype)


def _total(losses: Tensor, weight_of_row: Tensor | float) -> Tensor:
    """The sum of losses (rows, 1), weighted with one number for all rows or one for each."""
    if isinstance(weight_of_row, Tensor) and weight_of_row.ndim == 2:
        return (losses * weight_of_row).sum()
    return losses.sum() * weight_of_row


def _rows_at_once(weight: Tensor, weight_elements: int | None) -> int:
    """Rows of the head that one product reads."""
    if weight_elements is None:
        if not isinstance(weight, GridTensor):
            return max(weight.shape[0], 1)
        weight_elements = DENSE_ELEMENTS if device_type(weight) == "cpu" else GPU_DENSE_ELEMENTS
    return max(1, weight_elements // max(weight.shape[1], 1))


def _hidden_gradient(grad_logits: Tensor, weight: Tensor, weight_rows: int) -> Tensor:
    """`grad_logits @ weight`, (rows, hidden size)."""
    if weight_rows >= weight.shape[0]:
        return grad_logits @ weight
    total = torch.zeros(grad_logits.shape[0], weight.shape[1], device=grad_logits.device)
    for start in _starts(weight, weight_rows):
        part = slice(start, start + weight_rows)
        total += grad_logits[:, part] @ weight[part]
    return total.to(grad_logits.dtype)


# Up to a row for so many columns the copy in `_weight_gradient` is faster.
_WIDTH_PER_ROW = 11


def _weight_gradient(grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """`grad_logits.T @ hidden`, (vocabulary, hidden size)."""
    return torch.mm(_by_token_id(grad_logits, hidden).T, hidden, out=in_huge_pages(torch.empty_like(weight)))


def _by_token_id(grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of the logits, in the memory layout in which its product with the hidden states is faster."""
    rows, hidden_size = hidden.shape
    if device_type(hidden) == "cpu" and hidden.dtype == torch.bfloat16 and rows * _WIDTH_PER_ROW <= hidden_size:
        # A copy and a plain product are faster than a product with a transposed view (on one core, view and copy: 49152 x 576
        # with 40 rows 20 and 14 ms, with 192 rows 27 and 41; 32000 x 2048 with 128 rows 63 and 41).
        return grad_logits.T.contiguous().T
    return grad_logits


def _sliced_gradients(
    ctx: Any, grad_loss: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool, needs_product: bool
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], OuterProduct | None]:
    hidden, weight, labels, log_sum, *rest = ctx.saved_tensors
    bias = rest[0] if ctx.has_bias else None
    weight_of_row, scale, softcap = ctx.settings
    grad_hidden = torch.zeros(hidden.shape, device=hidden.device) if needs_hidden else None
    grad_weight = in_huge_pages(torch.empty_like(weight)) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
    grad_logits = hidden.new_empty(weight.shape[0], hidden.shape[0]) if needs_product else None
    for start in _starts(weight, ctx.slice_size):
        logits, tanh = _logits(hidden, weight, bias, start, ctx.slice_size, scale, softcap)
        part = slice(start, start + logits.shape[1])
        index, inside = _labels_in_slice(labels, start, logits.shape[1])
        grad = logits.float().sub_(log_sum.unsqueeze(1)).exp_()
        grad.scatter_add_(1, index, inside.neg().unsqueeze(1))
        grad = _through_head(grad, tanh, grad_loss * weight_of_row, scale).to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden += grad @ weight[part]
        if grad_weight is not None:
            torch.mm(grad.T, hidden, out=grad_weight[part])
        if grad_logits is not None:
            grad_logits[part] = grad.T
        if grad_bias is not None:
            torch.sum(grad, 0, out=grad_bias[part])
        del logits, tanh, grad  # before the next slice is made
    if grad_hidden is not None and ctx.part is not None:
        ctx.part.all_reduce(grad_hidden)
    product = None if grad_logits is None else OuterProduct(grad_logits, hidden)
    return (None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias), product


def _starts(weight: Tensor, size: int) -> Sequence[int]:
    """The first rows of the slices; on the meta device, which only measures memory, one of each kind of slice is enough."""
    starts = range(0, weight.shape[0], size)
    return (*starts[:2], starts[-1]) if weight.device.type == "meta" and len(starts) > 3 else starts


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int,
    size: int,
    scale: float,
    softcap: float | None,
    weight_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Logits of one slice, transformed (in float32, unless whole and untransformed), and their tanh if they are capped."""
    if weight_rows is None or weight_rows >= size:
        logits = _product(hidden, weight, bias, slice(start, start + size))
    else:
        logits = hidden.new_empty(hidden.shape[0], size)
        for first in _starts(weight, weight_rows):
            part = slice(first, min(first + weight_rows, size))
            logits[:, part] = _product(hidden, weight, bias, part)
    if size >= weight.shape[0] and scale == 1.0 and softcap is None:
        return logits, None  # log_softmax casts to float32 without an extra copy
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, None
    tanh = torch.tanh(logits / softcap)
    return tanh * softcap, tanh


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    return F.linear(hidden, weight[part], None if bias is None else bias[part])


def _through_head(grad: Tensor, tanh: Tensor | None, factor: Tensor | float, scale: float) -> Tensor:
    """Turn the gradient of the transformed logits, in place, into that of the head's own output, times `factor`."""
    if tanh is not None:
        grad.mul_(1 - tanh.square())
    return grad.mul_(factor * scale)


def _labels_in_slice(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The column of each label, clamped into the slice, (rows, 1); and 1.0 for a label in the slice, else 0, (rows,)."""
    index = labels - start
    inside = ((index >= 0) & (index < size)).float()
    return index.clamp(0, size - 1).unsqueeze(1), inside
