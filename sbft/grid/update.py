"""How a weight on a grid is updated: the definition that every backend follows bit for bit.

A block of codes with the scale s moves by `step * direction + decay * value`. In units of codes, in float32, each operation
rounded to nearest and none fused:

    d = direction * (step / s) + code * decay
    Q = code * 65536 - rint(d * 65536)                   an integer; rint rounds ties to even

If every Q of the block is within largest * 65536 of zero, the block stays on its scale:

    new code = (Q + noise) >> 16

with 16 bits of noise per element (`sbft.rounding`), so that the share of noises that round up is exactly the lower half of Q,
and a value on the grid stays. Otherwise, or if a d is not finite, the block grows: its scale becomes the smallest float16 s'
that reaches its largest value, and all its values are rounded anew with the same noise:

    q = code - d
    s' = smallest_scale(max |q| * s, largest)
    Q = rint((q * (s / s')) * 65536)
    new code = (Q + noise) >> 16, clamped to -largest .. largest

Whether a block grows does not depend on the noise. The clamp only takes back what rounding q may have added to the largest
value. Where the largest value is not finite, or no float16 reaches it, the scale becomes NaN and the codes 0.

Without a noise key the noise is 32768 for every element: rounding to nearest, ties upwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbft.grid.codes import Quantized, chunks, load_codes, smallest_scale, store_codes
from sbft.rounding import Key, noise_from_key

ONE = 1 << 16
"""Of the fixed point numbers that codes are rounded from."""

NEAREST = 1 << 15
"""The constant noise that rounds to nearest."""

_BEYOND = 1 << 30
"""Stands for any distance too large for the fixed point; any code minus it is beyond every grid."""


def moved(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor,
    noise: Tensor | int,
    *,
    step: Tensor | float,
    decay: Tensor | float,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Update blocks of codes, as the module's text defines it.

    Args:
        codes: integers of shape (..., block).
        scales: float16 of shape (...).
        direction: what is subtracted, before it is multiplied by `step`; float32 of shape (..., block).
        noise: int32 of the same shape in [0, 65535], or one number for all.
        step: factor of the direction, in units of the weight; a number, or float32 of shape ().
        decay: share by which values shrink; a number, or float32 of shape ().
        largest: the grid's largest code.

    Returns:
        The new codes, int32, and the new scales, float16.
    """
    codes = codes.to(torch.int32)
    wide = scales.float()
    step = torch.as_tensor(step, dtype=torch.float32, device=codes.device)
    decay = torch.as_tensor(decay, dtype=torch.float32, device=codes.device)
    distance = direction * (step / wide)[..., None] + codes * decay
    fixed = (distance * ONE).round()
    fixed = torch.where(fixed.abs() < _BEYOND, fixed, _BEYOND).to(torch.int32)
    exact = codes * ONE - fixed
    grows = (exact.abs() > largest * ONE).any(dim=-1)
    new_codes = (exact + noise) >> 16
    if not grows.any():
        return new_codes, scales
    wanted = codes - distance
    new_scales = smallest_scale(wanted.abs().amax(dim=-1) * wide, largest)
    shrunk = wanted * (wide / new_scales.float())[..., None] * ONE
    fixed = torch.where(torch.isnan(shrunk), 0.0, shrunk.round()).to(torch.int32)
    grown = ((fixed + noise) >> 16).clamp_(-largest, largest)
    grown = torch.where(torch.isnan(new_scales)[..., None], 0, grown)
    return torch.where(grows[..., None], grown, new_codes), torch.where(grows, new_scales, scales)


def apply_(
    weight: Quantized,
    direction: Tensor,
    *,
    step: Tensor | float,
    decay: Tensor | float,
    key: Key | None,
    offset: int = 0,
) -> None:
    """Update a weight in place: `value - step * direction - decay * value`, rounded to its grid.

    Args:
        weight: of shape (..., C).
        direction: float32 or bfloat16 of that shape, any strides.
        step: factor of the direction; a number, or float32 of shape ().
        decay: share by which values shrink, `lr * weight_decay`; a number, or float32 of shape ().
        key: noise key (`sbft.rounding.noise_key`); None rounds to nearest.
        offset: global element index of the weight's first element, where it is part of a larger one.
    """
    flat, source = weight.flat(), direction.reshape(-1, direction.shape[-1])
    columns = flat.shape[1]
    for start, stop in chunks(flat):
        noise: Tensor | int = NEAREST
        if key is not None:
            made = noise_from_key(key, (stop - start) * columns, offset + start * columns, direction.device)
            noise = made.view(stop - start, -1, weight.block)
        store_moved_(flat.rows(start, stop), source[start:stop].float(), noise, step=step, decay=decay)


def store_moved_(
    rows: Quantized, direction: Tensor, noise: Tensor | int, *, step: Tensor | float, decay: Tensor | float
) -> None:
    """Update rows of a (rows, C) weight in place by a float32 direction; noise int32 of shape (rows, C / block, block)."""
    shape = (-1, rows.block)
    codes, scales = moved(
        load_codes(rows).unflatten(-1, shape),
        rows.scales,
        direction.unflatten(-1, shape),
        noise,
        step=step,
        decay=decay,
        largest=rows.grid.largest,
    )
    store_codes(rows, codes.flatten(-2))
    rows.scales.copy_(scales)
