"""Stochastic rounding of float32 to bfloat16: the definition that every backend follows bit for bit.

A bfloat16 is the upper half of a float32. Adding 16 uniform random bits to the lower half, and then cutting that half off,
rounds up with exactly the probability that the lower half stands for. So the expected value is the exact one. The bits come
from a hash of (seed, step, parameter, global element index). There is no generator state, so resuming, the order of hooks,
sharding and the device cannot change them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = tuple[int, int] | tuple[Tensor, Tensor]
"""Two unsigned words of 32 bits; as tensors, int32 of shape () with the same bits."""

_MASK_64 = (1 << 64) - 1
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_HIGH_WORD_MULTIPLIER = 0x9E3779B9


@overload
def _mix_64(x: int) -> int: ...
@overload
def _mix_64(x: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def _mix_64(x: Any) -> Any:
    """The finalizer of splitmix64 (Steele et al., 2014): a bijection of 64-bit integers that mixes every bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def noise_key(seed: int, step: int, parameter: int) -> tuple[int, int]:
    """Two 32-bit words that key the noise of one parameter at one step.

    Args:
        seed: the run's seed, any integer.
        step: number of steps that the optimizer has finished.
        parameter: position of the parameter among all parameters of the optimizer.

    Returns:
        Unsigned words (first, second) as Python integers.
    """
    key = _mix_64(_step_key(seed, step) ^ (parameter & _MASK_64))
    return key & 0xFFFFFFFF, key >> 32


def noise_keys(seed: int, step: int, parameters: int) -> NDArray[np.int32]:
    """`noise_key` of the first `parameters` parameters, their words as int32 of shape (parameters, 2)."""
    keys = _mix_64(np.arange(parameters, dtype=np.uint64) ^ np.uint64(_step_key(seed, step)))
    return np.stack((keys, keys >> np.uint64(32)), axis=1).astype(np.uint32).view(np.int32)


@functools.lru_cache(maxsize=16)  # every parameter of a step asks for the same
def _step_key(seed: int, step: int) -> int:
    return _mix_64(_mix_64(seed & _MASK_64) ^ (step & _MASK_64))


@overload
def signed_32(word: int) -> int: ...
@overload
def signed_32(word: Tensor) -> Tensor: ...
def signed_32(word: int | Tensor) -> int | Tensor:
    """The int32 with the bits of an unsigned 32-bit `word`, as torch and Triton require; a tensor already is one."""
    if isinstance(word, Tensor):
        return word
    return word - (1 << 32) if word >= 1 << 31 else word


def noise_from_key(key: Key, count: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
    """Noise of `count` consecutive elements from global element index `offset` on; int32 of shape (count,) in [0, 65535].

    One 32-bit hash serves two elements, 16 apart, so that 16-lane vector units need no shuffles: element `i` takes counter
    `16 * (i // 32) + i % 16`, and the low half of its hash if `i // 16` is even, the high half otherwise. The hash is two
    multiply-xorshift rounds (the constants are Wellons' "lowbias32"), keyed before the first and between the two.
    """
    first_block, end_block = offset >> 5, (offset + count + 31) >> 5
    first, end = 16 * first_block, 16 * end_block
    wide = end > 1 << 31
    x = _hash(torch.arange(first, end, dtype=torch.int64 if wide else torch.int32, device=device), key)
    x = x.view(-1, 16)
    pairs = torch.stack((x & 0xFFFF, (x >> 16) & 0xFFFF), dim=1).view(-1)
    start = offset - 32 * first_block
    return pairs[start : start + count]


def noise_at(key: Key, index: Tensor) -> Tensor:
    """Noise of the elements with these global indices (int64), as `noise_from_key` gives it; int32 of the same shape."""
    x = _hash((index >> 5) * 16 + (index & 15), key)
    return torch.where((index & 16) == 0, x & 0xFFFF, (x >> 16) & 0xFFFF)


def _hash(counter: Tensor, key: Key) -> Tensor:
    """32-bit hashes of counters: int32, or int64 if one may reach 2^31. Counters in int32 are overwritten."""
    high: Tensor | int = 0
    x = counter
    if counter.dtype == torch.int64:
        x = counter.to(torch.int32)  # keeps the low 32 bits: the conversion wraps
        high = (counter >> 32).to(torch.int32) * signed_32(_HIGH_WORD_MULTIPLIER)
    x += signed_32(key[0])
    x ^= (x >> 16) & 0xFFFF
    x *= _MULTIPLIER_1
    x ^= ((x >> 15) & 0x1FFFF) ^ signed_32(key[1]) ^ high
    x *= signed_32(_MULTIPLIER_2)
    x ^= (x >> 16) & 0xFFFF
    return x


def noise(seed: int, step: int, parameter: int, shape: Sequence[int], offset: int = 0) -> Tensor:
    """The 16 random bits of each element of a parameter.

    Args:
        seed: the run's seed.
        step: number of steps that the optimizer has finished.
        parameter: position of the parameter among all parameters of the optimizer.
        shape: shape of the requested part of the parameter.
        offset: global element index (row-major) of that part's first element, for rows of a shard.

    Returns:
        int32 of `shape`, uniform in [0, 65535].
    """
    count = 1
    for size in shape:
        count *= size
    return noise_from_key(noise_key(seed, step, parameter), count, offset).reshape(tuple(shape))


def stochastic_round(values: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up in magnitude if the lower 16 bits plus `noise` carry.

    Values that bfloat16 can hold do not change, nor do infinities. NaN stays NaN. A finite value never becomes NaN, but
    beyond the largest bfloat16 it may become infinite, as under rounding to nearest.

    Args:
        values: float32, any shape.
        noise: int32 of the same shape in [0, 65535], drawn independently for each rounded tensor.

    Returns:
        bfloat16 of the same shape.

    Raises:
        TypeError: if `values` is not float32 or `noise` is not int32.
    """
    if values.dtype != torch.float32 or noise.dtype != torch.int32:
        raise TypeError(f"stochastic_round takes float32 values and int32 noise, got {values.dtype} and {noise.dtype}")
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)  # exact: the lower half is zero
    return torch.where(torch.isnan(values), torch.nan, rounded)
