"""The grids that a weight can be stored on: how many steps, and how many elements share a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GROUP = 32
"""Elements that are packed together; the last dimension of a weight on the grid is a multiple of it."""

LARGEST_OF_NIBBLE = 7
LARGEST_OF_BYTE = 127
LARGEST_OF_12_BITS = 2047


@dataclass(frozen=True, slots=True)
class Grid:
    """A symmetric grid: a value is an integer code times the scale of its block.

    Attributes:
        name: what recipes call it.
        largest: the largest code; codes are -largest to largest. Up to 7 a code takes 4 bits, up to 127 it takes 8, up to
            2047 it takes 12.
        block: the most consecutive elements of a row that share a scale, a power of two of at least 32.
        bits: bits that a code takes: 4, 8 or 12.

    Raises:
        ValueError: if `largest` or `block` is out of its domain.
    """

    name: str
    largest: int
    block: int
    bits: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.largest <= LARGEST_OF_12_BITS:
            raise ValueError(f"the largest code of a grid must be from 1 to {LARGEST_OF_12_BITS}, got {self.largest}")
        if self.block < GROUP or self.block & (self.block - 1):
            raise ValueError(f"the block of a grid must be a power of two of at least {GROUP}, got {self.block}")
        bits = 4 if self.largest <= LARGEST_OF_NIBBLE else 8 if self.largest <= LARGEST_OF_BYTE else 12
        object.__setattr__(self, "bits", bits)

    def block_of(self, columns: int) -> int:
        """Elements under one scale in rows of so many: the largest power of two that divides a row, at most `block`.

        Raises:
            ValueError: if the row is no multiple of 32.
        """
        if columns % GROUP:
            raise ValueError(f"a row of {columns} elements does not divide by {GROUP}")
        return math.gcd(columns, self.block)

    def size_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight of `shape`: its codes and its float16 scales."""
        count = math.prod(shape)
        return count * self.bits // 8 + 2 * (count // self.block_of(shape[-1]))


INT4 = Grid("int4", LARGEST_OF_NIBBLE, 32)
INT8 = Grid("int8", LARGEST_OF_BYTE, 128)
INT12 = Grid("int12", LARGEST_OF_12_BITS, 128)
GRIDS = {grid.name: grid for grid in (INT4, INT8, INT12)}
"""The usual grids, by the names that recipes have for them."""

VARIANTS = {
    grid.name: grid
    for grid in (Grid("int4/64", LARGEST_OF_NIBBLE, 64), Grid("int6", 31, 128), Grid("int8/32", LARGEST_OF_BYTE, 32))
}
"""Grids to compare the usual ones with: another block, or codes of 6 bits, which take a byte as those of 8 do."""

NAMED = {**GRIDS, **VARIANTS}
"""All grids that a recipe can ask for, by name."""

DTYPES = ("bfloat16", "float32")
"""Formats of weights that are dtypes, and no grids."""


def on_grids(weights: str | Mapping[str, str] | None) -> str | dict[str, str] | None:
    """The format of all weights, or the formats by pattern, as they were given; None if no weight is on a grid."""
    formats = weights.values() if isinstance(weights, Mapping) else [weights]
    if not any(name in NAMED for name in formats):
        return None
    return dict(weights) if isinstance(weights, Mapping) else weights


def fits(shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` can be stored on a grid: at least two dimensions, the last a multiple of 32."""
    return len(shape) >= 2 and shape[-1] % GROUP == 0 and math.prod(shape) > 0
