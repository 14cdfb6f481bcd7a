"""The updates in plain torch, block by block: the oracle of the compiled kernels, and the backend of devices that have none.

Every function updates one parameter in place. The elementwise arithmetic is float32 in exactly the order written here, without
fused multiply-adds, with correctly rounded division and square root. The compiled kernels follow it bit for bit; they differ
only in the order in which sums are taken.

Throughout, `weight` is float32 or bfloat16. `grad` has its shape, any strides, and is float32 or bfloat16. `mass` is the total
weight of the values in an average that started at zero (float32, shape ()); dividing by it removes the bias. `key` is the noise
key of the update (`sbft.rounding.noise_key`) if the weight is rounded stochastically, else None. Each update returns the sum
of the squared gradient; if that is not finite, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sbft.optim.kernels.blocks import (
    Block,
    Key,
    Weight,
    average_,
    blocks_of,
    matrices,
    move_,
    square_root,
    sum_of_squares,
    values_of,
    weight_matrices,
)
from sbft.optim.sharding import Shard

SMALLEST_RMS = 1e-3
"""Floor of the weight's RMS in a relative step (Shazeer and Stern, arXiv 1804.04235, section 8: epsilon 2)."""

SMALLEST_RATIO = 2.0**-126
"""Floor of a row's second moment as a share of the mean, float32's smallest normal number. A row without gradient has almost
no second moment beside large ones, and its factor would be infinite."""


# Adafactor


def step_size(
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    count: int,
    update_square_sum: Tensor,
    weight_square_sum: Tensor | None,
) -> Tensor:
    """Factor of the update: the rate, times the weight's RMS if relative, over the excess of the update's RMS; shape ()."""
    clip = (square_root(update_square_sum / count) / clip_threshold).clamp_(min=1.0)
    step = lr.to(clip.dtype) if isinstance(lr, Tensor) else torch.full_like(clip, lr)
    if relative_step:
        assert weight_square_sum is not None
        step *= square_root(weight_square_sum / count).clamp_(min=SMALLEST_RMS)
    return step / clip


def row_and_column_sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the squared gradient: (B, R, C) to (B, R) over columns and (B, C) over rows, float32."""
    stack, rows, columns = grad.shape
    row_sum = torch.zeros(stack, rows, dtype=torch.float32, device=grad.device)
    column_sum = torch.zeros(stack, columns, dtype=torch.float32, device=grad.device)
    for block in blocks_of(grad):
        b, r, c = block.index
        square = grad[block.index].float().square()
        row_sum[b, r] += square.sum(dim=1)
        column_sum[b, c] += square.sum(dim=0)
    return row_sum, column_sum


def update_factors(
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    row_sum: Tensor,
    column_sum: Tensor,
    average_weight: float | Tensor,
    eps: float,
    shard: Shard | None,
) -> tuple[Tensor, Tensor]:
    """Update the averages in place with the sums, and return the gradient's factors by row and by column.

    `row`, `row_sum` and the row factors are (B, R); `column`, `column_sum` and the column factors (B, C); all float32.
    """
    rows, columns = (row.shape[1], column.shape[1]) if shard is None else shard.shape[-2:]
    average_(row, row_sum / columns + eps, average_weight)
    average_(column, column_sum / rows + eps, average_weight)
    average_(mass, torch.ones_like(mass), average_weight)
    total = row.sum(dim=1, keepdim=True)
    if shard is not None:
        total = shard.sum_over_rows(total)
    ratio = (row / (total / rows)).clamp_(min=SMALLEST_RATIO)
    return 1.0 / square_root(ratio), 1.0 / square_root(column / mass)


def factored_update(grad: Tensor, row_factor: Tensor, column_factor: Tensor) -> Callable[[Block], Tensor]:
    """The unscaled update of a block, float32."""

    def update(block: Block) -> Tensor:
        b, r, c = block.index
        return grad[block.index].float() * row_factor[b, r, None] * column_factor[b, c]

    return update


def apply_(
    weight: Weight,
    update: Callable[[Block], Tensor],
    step: Tensor | float,
    decay: float | Tensor,
    key: Key,
    shard: Shard | None,
    want_sum: bool,
) -> Tensor | None:
    """`weight -= decay * weight + step * update`, rounded; returns the sum of the squared new weights if `want_sum`."""
    square_sum = torch.zeros((), dtype=torch.float32, device=weight.device) if want_sum else None
    for block in blocks_of(weight):
        move_(weight, block, update(block), step, decay, key, shard)
        if square_sum is not None:
            square_sum += values_of(weight, block).square().sum()
    return square_sum


def adafactor_factored(
    weight: Weight,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: float | Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, float | Tensor | None]:
    """Adafactor with a second moment factored over the last two dimensions (arXiv 1804.04235, algorithm 4).

    Args:
        weight: (..., R, C).
        grad: (..., R, C).
        row: (..., R) float32, average over time of the squared gradient's mean over columns.
        column: (..., C) float32, the same over rows.
        mass: total weight of the values in the two averages.
        weight_square_sum: sum of the squared weights as they are now, if known from the last update; shape (). A float, which
            the C++ update carries, is not used: its terms were added in another order.
        average_weight: weight of this gradient in the averages, one minus beta2.
        lr: learning rate.
        relative_step: whether the step is scaled by the weight's RMS.
        clip_threshold: the update is scaled down until its RMS over the whole tensor is at most this.
        eps: added to the squared gradient.
        weight_decay: decoupled: the weight shrinks by `lr * weight_decay`.
        key: noise key, or None.
        shard: which part of the parameter this is; None for all of it.

    Returns:
        Sum of the squared gradient; and of the squared new weights (of a shard, its own), if `relative_step`.
    """
    w, g = weight_matrices(weight), matrices(grad)
    # A rank without rows still has the averages of all columns, and the other way round: hence the explicit shapes.
    row, column = row.view(w.shape[:2]), column.view(w.shape[0], w.shape[2])
    row_sum, column_sum = row_and_column_sums(g)
    grad_square_sum = row_sum.sum()
    if shard is not None:
        row_sum, column_sum, grad_square_sum = shard.sums_of_gradient(row_sum, column_sum, grad_square_sum)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum, weight_square_sum
    factors = update_factors(row, column, mass, row_sum, column_sum, average_weight, eps, shard)
    update = factored_update(g, *factors)
    return grad_square_sum, step_and_apply(
        w, lambda: [(w, update, shard)], weight_square_sum, lr, relative_step, clip_threshold, weight_decay, key, shard
    )


def adafactor_full(
    weight: Weight,
    grad: Tensor,
    second_moment: Tensor,
    mass: Tensor,
    weight_square_sum: float | Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, float | Tensor | None]:
    """Adafactor with a second moment per element, for vectors and small matrices.

    `second_moment` is float32 of the weight's shape, contiguous; everything else as in `adafactor_factored`.
    """
    w, g, v = weight_matrices(weight), matrices(grad), matrices(second_moment)
    grad_square_sum = _gradient_square_sum(g, shard)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum, weight_square_sum
    for block in blocks_of(v):
        average_(v[block.index], g[block.index].float().square() + eps, average_weight)
    average_(mass, torch.ones_like(mass), average_weight)

    def update(block: Block) -> Tensor:
        return g[block.index].float() / square_root(v[block.index] / mass)

    return grad_square_sum, step_and_apply(
        w, lambda: [(w, update, shard)], weight_square_sum, lr, relative_step, clip_threshold, weight_decay, key, shard
    )


def _gradient_square_sum(grad: Tensor, shard: Shard | None) -> Tensor:
    total = sum_of_squares(grad, lambda block: grad[block.index].float())
    return total if shard is None else shard.sum(total)[0]


Part = tuple[Weight, Callable[[Block], Tensor], Shard | None]
"""Some rows of a weight, their unscaled update, and which part of the parameter they are."""


def step_and_apply(
    w: Weight,
    parts: Callable[[], Iterable[Part]],
    weight_square_sum: float | Tensor | None,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None,
) -> Tensor | None:
    """Scale the update of a (B, R, C) weight and apply it, part by part; the sum of the squared new weights if they are known.

    Args:
        w: the weight.
        parts: makes its parts, which are gone through twice.
        weight_square_sum: see `adafactor_factored`, as of all further arguments.
    """
    update_square_sum = torch.zeros((), dtype=torch.float32, device=w.device)
    for part, update, _ in parts():
        update_square_sum += sum_of_squares(part, update)
    del part, update  # what they hold of a gradient would live beside that of the next pass
    if not isinstance(weight_square_sum, Tensor):
        weight_square_sum = None
    if relative_step and weight_square_sum is None:
        weight_square_sum = sum_of_squares(w, lambda block: values_of(w, block))
    count = w.numel()
    if shard is not None:
        count = shard.count
        known = torch.zeros_like(update_square_sum) if weight_square_sum is None else weight_square_sum
        update_square_sum, weight_square_sum = shard.sum(update_square_sum, known)
    step = step_size(lr, relative_step, clip_threshold, count, update_square_sum, weight_square_sum)
    new_square_sum = torch.zeros((), dtype=torch.float32, device=w.device) if relative_step else None
    for part, update, place in parts():
        of_part = apply_(part, update, step, lr * weight_decay, key, place, relative_step)
        if new_square_sum is not None and of_part is not None:
            new_square_sum += of_part
    return new_square_sum


# AdamW and SGD


def adamw(
    weight: Weight,
    grad: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    first_mass: Tensor,
    second_mass: Tensor,
    *,
    first_weight: float | Tensor,
    second_weight: float | Tensor,
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); `first_moment=None` means that beta1 is zero.

    Args:
        weight: any shape.
        grad: the same shape.
        first_moment: float32 of that shape, contiguous, or None.
        second_moment: float32 of that shape, contiguous.
        first_mass: total weight of the values in the first moment.
        second_mass: the same for the second moment.
        first_weight: weight of this gradient in the first moment, one minus beta1.
        second_weight: weight of its square in the second moment, one minus beta2.
        lr: learning rate.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        key: noise key, or None.
        shard: which part of the parameter this is; None for all of it.

    Returns:
        Sum of the squared gradient.
    """
    w, g, v = weight_matrices(weight), matrices(grad), matrices(second_moment)
    m = None if first_moment is None else matrices(first_moment)
    grad_square_sum = _gradient_square_sum(g, shard)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum
    average_(first_mass, torch.ones_like(first_mass), first_weight)
    average_(second_mass, torch.ones_like(second_mass), second_weight)

    def update(block: Block) -> Tensor:
        gradient = g[block.index].float()
        average_(v[block.index], gradient.square(), second_weight)
        mean = gradient if m is None else average_(m[block.index], gradient, first_weight) / first_mass
        return mean / (square_root(v[block.index] / second_mass) + eps)

    apply_(w, update, lr, lr * weight_decay, key, shard, want_sum=False)
    return grad_square_sum


def sgd(
    weight: Weight,
    grad: Tensor,
    momentum: Tensor | None,
    mass: Tensor | None,
    *,
    momentum_weight: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> Tensor:
    """Stochastic gradient descent, with the gradient's bias-corrected average in its place where `momentum` is given.

    Args:
        weight: any shape.
        grad: the same shape.
        momentum: float32 of that shape, contiguous, or None.
        mass: total weight of the values in the average; None without momentum.
        momentum_weight: weight of this gradient in the average.
        lr: learning rate.
        weight_decay: decoupled.
        key: noise key, or None.
        shard: which part of the parameter this is; None for all of it.

    Returns:
        Sum of the squared gradient.
    """
    w, g = weight_matrices(weight), matrices(grad)
    grad_square_sum = _gradient_square_sum(g, shard)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum
    if momentum is None:
        apply_(w, lambda block: g[block.index].float(), lr, lr * weight_decay, key, shard, want_sum=False)
        return grad_square_sum
    assert mass is not None
    m = matrices(momentum)
    average_(mass, torch.ones_like(mass), momentum_weight)

    def update(block: Block) -> Tensor:
        return average_(m[block.index], g[block.index].float(), momentum_weight) / mass

    apply_(w, update, lr, lr * weight_decay, key, shard, want_sum=False)
    return grad_square_sum
