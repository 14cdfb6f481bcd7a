"""Stochastic rounding, proved by enumerating all noise values, and the noise itself."""

import math
import struct

import pytest
import torch

from sbft.rounding import noise, noise_at, noise_from_key, noise_key, stochastic_round

ALL_NOISE = torch.arange(65536, dtype=torch.int32)


def float_from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def tensor_from_bits(bits: int, count: int) -> torch.Tensor:
    signed = bits - (1 << 32) if bits >= 1 << 31 else bits
    return torch.full((count,), signed, dtype=torch.int32).view(torch.float32)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16).to(torch.int32) & 0xFFFF


FINITE = {
    "one and a bit": 0x3F800001,
    "one and nearly two ulps": 0x3F80FFFF,
    "minus 3.1": struct.unpack("<I", struct.pack("<f", -3.1))[0],
    "half way": 0x42288000,
    "minus half way": 0xC2288000,
    "smallest subnormal": 0x00000001,
    "minus a subnormal": 0x80012345,
    "largest subnormal": 0x007FFFFF,
    "smallest normal": 0x00800000,
    "largest finite": 0x7F7FFFFF,
    "minus largest finite": 0xFF7FFFFF,
    "largest bfloat16": 0x7F7F0000,
    "plus zero": 0x00000000,
    "minus zero": 0x80000000,
    "held by bfloat16": 0xC0490000,
}


@pytest.mark.parametrize("bits", FINITE.values(), ids=FINITE.keys())
def test_every_noise_value_rounds_up_exactly_as_often_as_the_lower_half_says(bits):
    rounded = bits_of(stochastic_round(tensor_from_bits(bits, 65536), ALL_NOISE))
    upper, lower = bits >> 16, bits & 0xFFFF
    assert int((rounded == upper + 1).sum()) == lower
    assert int((rounded == upper).sum()) == 65536 - lower
    assert not torch.isnan(stochastic_round(tensor_from_bits(bits, 65536), ALL_NOISE)).any()


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000])
def test_infinity_stays_for_every_noise_value(bits):
    rounded = stochastic_round(tensor_from_bits(bits, 65536), ALL_NOISE)
    assert bool((rounded == float_from_bits(bits)).all())


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00001, 0xFFFFFFFF, 0x7F80FFFF])
def test_every_kind_of_nan_stays_nan_for_every_noise_value(bits):
    assert bool(torch.isnan(stochastic_round(tensor_from_bits(bits, 65536), ALL_NOISE)).all())


def test_the_mean_over_all_noise_is_the_value_itself():
    for value in (0.1, -1.7, 1234.567, 1e-20):
        exact = torch.tensor(value).item()
        rounded = stochastic_round(torch.full((65536,), value), ALL_NOISE).double()
        # Both neighbours are exact in float64, and the sum of 65,536 of them is exact but for its last digits.
        assert rounded.mean().item() == pytest.approx(exact, rel=1e-12)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        stochastic_round(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="int64"):
        stochastic_round(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


# The noise


def reference_noise(key: tuple[int, int], index: int) -> int:
    """The noise by its definition, in Python integers, for one element."""
    counter = 16 * (index // 32) + index % 16
    x = (counter % 2**32 + key[0]) % 2**32
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= (x >> 15) ^ key[1] ^ ((counter >> 32) * 0x9E3779B9 % 2**32)
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    return (x >> (16 * (index // 16 % 2))) & 0xFFFF


@pytest.mark.parametrize("offset", [0, 1, 31, 2**31 - 20, 2**32 - 7, 2**33 + 5, 2**37 + 3])
def test_noise_follows_its_definition_beyond_32_bits(offset):
    key = noise_key(seed=7, step=11, parameter=13)
    made = noise_from_key(key, 100, offset)
    assert made.dtype == torch.int32
    assert made.tolist() == [reference_noise(key, offset + i) for i in range(100)]


def test_a_shard_sees_the_noise_of_its_own_rows():
    whole = noise(1, 2, 3, (50, 37))
    assert torch.equal(noise(1, 2, 3, (20, 37), offset=13 * 37), whole[13:33])


@pytest.mark.parametrize("change", ["seed", "step", "parameter"])
def test_noise_of_another_seed_step_or_parameter_is_independent(change):
    one = {"seed": 3, "step": 5, "parameter": 9}
    other = {**one, change: one[change] + 1}
    count = 1 << 18
    a, b = (noise(**x, shape=(count,)).double() for x in (one, other))
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(count)  # five standard errors
    for lag in (1, 16, 32):
        shifted = torch.corrcoef(torch.stack([a[lag:], b[:-lag]]))[0, 1].item()
        assert abs(shifted) < 5 / math.sqrt(count - lag)


def test_noise_is_uniform_and_neighbours_are_independent():
    count = 1 << 22
    values = noise(0, 0, 0, (count,))
    assert values.min() >= 0 and values.max() <= 65535
    for bins in ((values >> 8).long(), (values & 255).long()):
        expected = count / 256
        chi_square = ((torch.bincount(bins, minlength=256) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)  # five standard deviations, at 255 degrees of freedom
    centred = values.double() - 32767.5
    for lag in (1, 2, 15, 16, 17, 32, 576):
        correlation = (centred[lag:] * centred[:-lag]).mean().item() / (65536**2 / 12)
        assert abs(correlation) < 5 / math.sqrt(count)


@pytest.mark.parametrize("first", [0, 5, 2**31 - 40, 2**36 + 3])
def test_noise_at_scattered_elements_is_that_of_the_whole(first: int) -> None:
    key = noise_key(3, 5, 9)
    consecutive = noise_from_key(key, 200, first)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).view(20, 10)
    assert torch.equal(noise_at(key, first + order), consecutive[order])


def test_negative_and_huge_seeds_are_keys_too():
    assert noise_key(-1, 0, 0) != noise_key(1, 0, 0)
    assert all(0 <= word < 2**32 for word in noise_key(2**80 + 1, 2**40, 2**20))
