"""How a weight on a grid is updated: the definition that every backend follows bit for bit.

A block of codes with the scale s moves by `step * direction + decay * value`. In units of codes, in float32, each operation
rounded to nearest and none fused:

    d = direction * (step / s) + code * decay
    Q = code * 65536 - rint(d * 65536)                   an integer; rint rounds ties to even

    new code = (Q + noise) >> 16

with 16 bits of noise per element (`sbft.rounding`). The probability of rounding up is thus exactly the fraction given by the
lower half of Q, and a value on the grid stays. If no new code exceeds the grid's largest, the update ends here. Otherwise the
block grows: its scale becomes the smallest float16 s' that reaches the new codes, and they are rounded again with a second,
independent noise:

    v = new code, or code - d where d is not below 2^14 in magnitude
    s' = smallest_scale(max |v| * s, largest)
    Q = rint((v * (s / s')) * 65536)
    new code = (Q + second noise) >> 16, clamped to -largest .. largest

Both roundings are unbiased, and so is their sequence. The clamp only takes back what float32 may have added to the largest v.
Where that value is not finite, or no float16 reaches it, the scale becomes NaN and the codes 0.

Rounded values, not exact ones, decide whether a block grows. If each update moves the largest value outwards by a thousandth of
the spacing, the block grows once in a thousand updates, by a whole spacing. The alternative is to grow in each update by the
least that float16 can express. It would round all other values so often that the weight's error after 400 steps at 1e-4 was
2.3 times as large on 4 bits.

Without a noise key both noises are 32768 for every element: rounding to nearest, ties upwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbft.grid.codes import Quantized, chunks, load_codes, smallest_scale, store_codes
from sbft.rounding import Key, noise_from_key

ONE = 1 << 16
"""Fractional bits of the fixed point numbers that codes are rounded from."""

NEAREST = 1 << 15
"""The constant noise that rounds to nearest."""

Noise = tuple[Tensor, Tensor] | tuple[int, int]

_BEYOND = 1 << 30
"""Replaces larger fixed point distances; any code minus this distance exceeds every grid."""


def moved(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor,
    noise: Noise,
    *,
    step: Tensor | float,
    decay: Tensor | float,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """Update blocks of codes, as the module's docstring defines it.

    Args:
        codes: integers of shape (..., block).
        scales: float16 of shape (...).
        direction: subtracted after multiplication by `step`; float32 of shape (..., block).
        noise: first and second noise, each int32 of the same shape in [0, 65535], or one number for all.
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
    is_near = fixed.abs() < _BEYOND  # false for NaN
    fixed = torch.where(is_near, fixed, _BEYOND).to(torch.int32)
    new_codes = (codes * ONE - fixed + noise[0]) >> 16
    grows = (new_codes.abs() > largest).any(dim=-1)
    if not grows.any():
        return new_codes, scales
    wanted = torch.where(is_near, new_codes.float(), codes - distance)
    new_scales = smallest_scale(wanted.abs().amax(dim=-1) * wide, largest)
    scaled = wanted * (wide / new_scales.float())[..., None] * ONE
    fixed = torch.where(torch.isnan(scaled), 0.0, scaled.round()).to(torch.int32)
    grown = ((fixed + noise[1]) >> 16).clamp_(-largest, largest)
    grown = torch.where(torch.isnan(new_scales)[..., None], 0, grown)
    return torch.where(grows[..., None], grown, new_codes), torch.where(grows, new_scales, scales)


def noise_of(key: Key | None, count: int, offset: int, device: torch.device) -> Noise:
    """First and second noise of `count` elements from global element index `offset` on; without a key, for nearest."""
    if key is None:
        return NEAREST, NEAREST
    return noise_from_key(key, count, offset, device), noise_from_key(second_key(key), count, offset, device)


def second_key(key: Key) -> Key:
    """The key of the second noise: the words of the first in the other order."""
    first, second = key
    return (second, first)  # type: ignore[return-value]


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
        offset: global index of the weight's first element, if it is part of a larger weight.
    """
    flat, source = weight.flat(), direction.reshape(-1, direction.shape[-1])
    columns = flat.shape[1]
    for start, stop in chunks(flat):
        noise = noise_of(key, (stop - start) * columns, offset + start * columns, direction.device)
        store_moved_(flat.rows(start, stop), source[start:stop].float(), noise, step=step, decay=decay)


def store_moved_(
    rows: Quantized, direction: Tensor, noise: Noise, *, step: Tensor | float, decay: Tensor | float
) -> None:
    """Update rows of a (rows, C) weight in place by a float32 direction, with two noises of its shape, or two numbers."""
    shape = (-1, rows.block)
    blocks = (rows.shape[0], -1, rows.block)
    first, second = (each if isinstance(each, int) else each.view(blocks) for each in noise)
    codes, scales = moved(
        load_codes(rows).unflatten(-1, shape),
        rows.scales,
        direction.unflatten(-1, shape),
        (first, second),  # type: ignore[arg-type]
        step=step,
        decay=decay,
        largest=rows.grid.largest,
    )
    store_codes(rows, codes.flatten(-2))
    rows.scales.copy_(scales)
