"""The noise of stochastic rounding in Triton."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def noise_bits(base, lane, key_0, key_1, ALIGNED: tl.constexpr):
    """Noise of the elements with global index `base + lane`, as `sbft.rounding.noise_from_key`; uint32 below 65536.

    `ALIGNED` promises that `base` is a multiple of 32.
    """
    if ALIGNED:
        counter = (base >> 1) + ((lane >> 5) * 16 + (lane & 15))
        half = lane & 16
    else:
        index = base + lane
        counter = (index >> 5) * 16 + (index & 15)
        half = (index & 16).to(tl.int32)
    x = counter.to(tl.uint32) + key_0.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (x >> 15) ^ key_1.to(tl.uint32)
    if counter.dtype.primitive_bitwidth == 64:
        x ^= (counter >> 32).to(tl.uint32) * 0x9E3779B9
    x *= 0x846CA68B
    x ^= x >> 16
    return (x >> half.to(tl.uint32)) & 0xFFFF
