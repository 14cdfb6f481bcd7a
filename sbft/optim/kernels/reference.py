"""The updates in plain torch, block by block: the oracle of the compiled kernels, and the backend of devices that have none.

Every function updates one parameter in place. The elementwise arithmetic is float32 in exactly the order written here, without
fused multiply-adds, with correctly rounded division and square root. The compiled kernels follow it bit for bit; they differ
only in the order in which sums are taken.

Throughout: `weight` is float32 or bfloat16, `grad` has its shape, any strides, float32 or bfloat16. A `mass` is the weight that
an average started at zero has collected so far (float32, shape ()); dividing by it removes the bias. `key` is the noise key of
the update (`sbft.rounding.noise_key`) if the weight is to be rounded stochastically, else None. Each update returns the sum
of the squared gradient; if that is not finite, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sbft import rounding
from sbft.optim.sharding import Shard
from sbft.rounding import noise_at, noise_from_key, stochastic_round

BLOCK_ELEMENTS = 1 << 13
"""Elements handled at once, so that all temporaries of a step together stay below 1 MiB."""

SMALLEST_RMS = 1e-3
"""Floor of the weight's RMS in a relative step (Shazeer and Stern, arXiv 1804.04235, section 8: epsilon 2)."""

SMALLEST_RATIO = 2.0**-126
"""Floor of a row's second moment as a share of the mean, float32's smallest normal number: what is left of a row without
gradient vanishes beside large ones, and its factor would be infinite."""

Key = rounding.Key | None


GPU_BLOCK_ELEMENTS = 1 << 20
"""The same on a GPU, where every operation is a launch, which takes as long as some hundred thousand elements."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of consecutive elements of a (B, R, C) tensor: some rows whole, or a piece of one row."""

    index: tuple[int, slice, slice]
    offset: int
    count: int


def matrices(tensor: Tensor) -> Tensor:
    """A (B, R, C) view of a tensor of any shape, leading dimensions flattened.

    Raises:
        ValueError: if the strides of a tensor of more than three dimensions allow no such view.
    """
    if tensor.ndim <= 3:
        return tensor[(None,) * (3 - tensor.ndim)]
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"a parameter or gradient of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be seen as a stack "
            "of matrices: make the parameter contiguous"
        ) from None


def blocks(shape: torch.Size, most: int = BLOCK_ELEMENTS) -> Iterator[Block]:
    """Cut a (B, R, C) shape into blocks of at most so many elements, in order of their global index."""
    stack, rows, columns = shape
    row_step, column_step = max(1, most // max(columns, 1)), max(1, min(columns, most))
    for b in range(stack):
        for r in range(0, rows, row_step):
            for c in range(0, columns, column_step):
                r_end, c_end = min(r + row_step, rows), min(c + column_step, columns)
                count = (r_end - r) * (c_end - c)
                yield Block((b, slice(r, r_end), slice(c, c_end)), (b * rows + r) * columns + c, count)


def blocks_of(tensor: Tensor) -> Iterator[Block]:
    """Cut a (B, R, C) tensor into blocks of a size that suits its device."""
    return blocks(tensor.shape, BLOCK_ELEMENTS if tensor.device.type in ("cpu", "meta") else GPU_BLOCK_ELEMENTS)


def sum_of_squares(tensor: Tensor, values: Callable[[Block], Tensor]) -> Tensor:
    """Sum of the squares of `values(block)` over all blocks of a tensor; float32 of shape ()."""
    total = torch.zeros((), dtype=torch.float32, device=tensor.device)
    for block in blocks_of(tensor):
        total += values(block).square().sum()
    return total


def average_(average: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """Move an average in place towards `value` by `weight`, a number, or a tensor of shape () on its device."""
    if isinstance(weight, Tensor):
        weight = weight.to(average.dtype)  # as a number is taken
    return average.add_((value - average).mul_(weight))


def store_(weight: Tensor, block: Block, values: Tensor, key: Key, shard: Shard | None) -> None:
    """Write float32 `values` into a block of a (B, R, C) weight, rounded as its dtype and the key ask."""
    if weight.dtype == torch.bfloat16 and key is not None:
        if shard is not None and shard.columns_split:
            b, r, c = block.index
            row = torch.arange(r.start, r.stop, device=weight.device) + b * weight.shape[1]
            column = torch.arange(c.start, c.stop, device=weight.device) + shard.offset
            noise = noise_at(key, (row[:, None] * shard.shape[-1] + column).view(-1))
        else:
            offset = block.offset + (0 if shard is None else shard.offset)
            noise = noise_from_key(key, block.count, offset, weight.device)
        values = stochastic_round(values, noise.view(values.shape))
    weight[block.index].copy_(values)


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded; torch's own on a CPU is a step of float32 off for one number in 150 (torch 2.13, through MKL)."""
    return values.double().sqrt_().float() if values.device.type == "cpu" else values.sqrt()


# Adafactor


def step_size(
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    count: int,
    update_square_sum: Tensor,
    weight_square_sum: Tensor | None,
) -> Tensor:
    """What the update is multiplied with: the rate, times the weight's RMS, over the excess of the update's RMS; shape ()."""
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
    """Take the sums into the averages (in place) and return what a gradient is multiplied with, by row and by column.

    `row` and `row_sum` are (B, R), `column` and `column_sum` (B, C), all float32; so are the two factors.
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
    weight: Tensor,
    update: Callable[[Block], Tensor],
    step: Tensor | float,
    shrink: float | Tensor,
    key: Key,
    shard: Shard | None,
    want_sum: bool,
) -> Tensor | None:
    """`weight = weight * shrink - step * update`, rounded; returns the sum of the squared new weights if wanted."""
    square_sum = torch.zeros((), dtype=torch.float32, device=weight.device) if want_sum else None
    for block in blocks_of(weight):
        store_(weight, block, weight[block.index].float() * shrink - update(block) * step, key, shard)
        if square_sum is not None:
            square_sum += weight[block.index].float().square().sum()
    return square_sum


def adafactor_factored(
    weight: Tensor,
    grad: Tensor,
    row: Tensor,
    column: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Adafactor with a second moment factored over the last two dimensions (arXiv 1804.04235, algorithm 4).

    Args:
        weight: (..., R, C).
        grad: (..., R, C).
        row: (..., R) float32, average over time of the squared gradient's mean over columns.
        column: (..., C) float32, the same over rows.
        mass: weight that the two averages have collected.
        weight_square_sum: sum of the squared weights as they are now, if known from the last update; shape ().
        average_weight: weight of this gradient in the averages, one minus beta2.
        lr: learning rate.
        relative_step: whether the step is scaled by the weight's RMS.
        clip_threshold: the update is scaled down until its RMS over the whole tensor is at most this.
        eps: added to the squared gradient.
        weight_decay: decoupled: the weight shrinks by `lr * weight_decay`.
        key: noise key, or None.
        shard: what part of the parameter this is, or None.

    Returns:
        Sum of the squared gradient; and of the squared new weights here, if `relative_step`.
    """
    w, g = matrices(weight), matrices(grad)
    # A rank may have none of the rows, and has the averages of all columns nevertheless; or the other way round.
    row, column = row.view(w.shape[:2]), column.view(w.shape[0], w.shape[2])
    row_sum, column_sum = row_and_column_sums(g)
    grad_square_sum = row_sum.sum()
    if shard is not None:
        row_sum, column_sum, grad_square_sum = shard.sums_of_gradient(row_sum, column_sum, grad_square_sum)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum, weight_square_sum
    factors = update_factors(row, column, mass, row_sum, column_sum, average_weight, eps, shard)
    update = factored_update(g, *factors)
    return grad_square_sum, _step_and_apply(
        w, update, weight_square_sum, lr, relative_step, clip_threshold, weight_decay, key, shard
    )


def adafactor_full(
    weight: Tensor,
    grad: Tensor,
    second_moment: Tensor,
    mass: Tensor,
    weight_square_sum: Tensor | None,
    *,
    average_weight: float | Tensor,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    eps: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Adafactor with a second moment per element, for vectors and small matrices.

    `second_moment` is float32 of the weight's shape, contiguous; everything else as in `adafactor_factored`.
    """
    w, g, v = matrices(weight), matrices(grad), matrices(second_moment)
    grad_square_sum = _gradient_square_sum(g, shard)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum, weight_square_sum
    for block in blocks_of(v):
        average_(v[block.index], g[block.index].float().square() + eps, average_weight)
    average_(mass, torch.ones_like(mass), average_weight)

    def update(block: Block) -> Tensor:
        return g[block.index].float() / square_root(v[block.index] / mass)

    return grad_square_sum, _step_and_apply(
        w, update, weight_square_sum, lr, relative_step, clip_threshold, weight_decay, key, shard
    )


def _gradient_square_sum(grad: Tensor, shard: Shard | None) -> Tensor:
    total = sum_of_squares(grad, lambda block: grad[block.index].float())
    return total if shard is None else shard.sum(total)[0]


def _step_and_apply(
    w: Tensor,
    update: Callable[[Block], Tensor],
    weight_square_sum: Tensor | None,
    lr: float | Tensor,
    relative_step: bool,
    clip_threshold: float,
    weight_decay: float,
    key: Key,
    shard: Shard | None,
) -> Tensor | None:
    update_square_sum = sum_of_squares(w, update)
    if relative_step and weight_square_sum is None:
        weight_square_sum = sum_of_squares(w, lambda block: w[block.index].float())
    count = w.numel()
    if shard is not None:
        count = shard.count
        known = torch.zeros_like(update_square_sum) if weight_square_sum is None else weight_square_sum
        update_square_sum, weight_square_sum = shard.sum(update_square_sum, known)
    step = step_size(lr, relative_step, clip_threshold, count, update_square_sum, weight_square_sum)
    return apply_(w, update, step, 1.0 - lr * weight_decay, key, shard, relative_step)


# AdamW and SGD


def adamw(
    weight: Tensor,
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
        first_mass: weight that the first moment has collected.
        second_mass: weight that the second moment has collected.
        first_weight: weight of this gradient in the first moment, one minus beta1.
        second_weight: weight of its square in the second moment, one minus beta2.
        lr: learning rate.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        key: noise key, or None.
        shard: what part of the parameter this is, or None.

    Returns:
        Sum of the squared gradient.
    """
    w, g, v = matrices(weight), matrices(grad), matrices(second_moment)
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

    apply_(w, update, lr, 1.0 - lr * weight_decay, key, shard, want_sum=False)
    return grad_square_sum


def sgd(
    weight: Tensor,
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
        mass: weight that the average has collected; None without momentum.
        momentum_weight: weight of this gradient in the average.
        lr: learning rate.
        weight_decay: decoupled.
        key: noise key, or None.
        shard: what part of the parameter this is, or None.

    Returns:
        Sum of the squared gradient.
    """
    w, g = matrices(weight), matrices(grad)
    grad_square_sum = _gradient_square_sum(g, shard)
    if not torch.isfinite(grad_square_sum):
        return grad_square_sum
    if momentum is None:
        apply_(w, lambda block: g[block.index].float(), lr, 1.0 - lr * weight_decay, key, shard, want_sum=False)
        return grad_square_sum
    assert mass is not None
    m = matrices(momentum)
    average_(mass, torch.ones_like(mass), momentum_weight)

    def update(block: Block) -> Tensor:
        return average_(m[block.index], g[block.index].float(), momentum_weight) / mass

    apply_(w, update, lr, 1.0 - lr * weight_decay, key, shard, want_sum=False)
    return grad_square_sum
