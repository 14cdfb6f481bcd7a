"""Updates on a grid, proved by enumerating all noise values and compared with an oracle in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sbft.grid.codes import dequantize, load_codes, quantize, smallest_scale
from sbft.grid.formats import GRIDS, INT4, INT8, INT12
from sbft.grid.update import NEAREST, apply_, moved, noise_of
from sbft.rounding import noise_from_key, noise_key
from tests.unit.grid.quantized import copy_of, same

ALL_NOISE = torch.arange(65536, dtype=torch.int32)
KEY = noise_key(1, 2, 3)
LARGEST = [grid.largest for grid in GRIDS.values()]


def under_all_noise(
    codes: list[int], scale: float, direction: list[float], largest: int, *, step: float = 1.0, second: int | None = 0
) -> tuple[Tensor, Tensor]:
    """One block (padded to 32 elements) updated under every first noise, or with `second=None` under every second one.

    Returns:
        Codes (65536, elements) and scales (65536,).
    """
    count = len(codes)
    block = torch.zeros(65536, 32, dtype=torch.int32)
    block[:, :count] = torch.tensor(codes, dtype=torch.int32)
    moves = torch.zeros(65536, 32)
    moves[:, :count] = torch.tensor(direction)
    every, none = ALL_NOISE[:, None].expand(-1, 32), torch.zeros(65536, 32, dtype=torch.int32)
    noise = (none, every) if second is None else (every, none + second)
    scales = torch.full((65536,), scale, dtype=torch.float16)
    new_codes, new_scales = moved(block, scales, moves, noise, step=step, decay=0.0, largest=largest)
    assert (new_codes[:, count:] == 0).all()
    return new_codes[:, :count], new_scales


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("share", [0, 1, 2, 12345, 32768, 65535])
@pytest.mark.parametrize("whole", [-2, 0, 1])
def test_every_noise_rounds_up_exactly_as_often_as_the_fraction_says(largest, share, whole):
    fraction = whole + share / 65536  # exact in float32
    codes = [0, 3, -3, 2 - largest, largest - 2]
    new, scales = under_all_noise(codes, 0.5, [-fraction * 0.5] * len(codes), largest)
    assert (scales == 0.5).all()
    for element, code in enumerate(codes):
        assert int((new[:, element] == code + whole + 1).sum()) == share
        assert int((new[:, element] == code + whole).sum()) == 65536 - share


@pytest.mark.parametrize("largest", LARGEST)
def test_values_on_the_grid_stay_under_every_noise(largest):
    codes = [-largest, -1, 0, 1, largest]
    for direction in (0.0, -0.0):
        new, scales = under_all_noise(codes, 0.3, [direction] * 5, largest, step=7.0)
        assert torch.equal(new, torch.tensor([codes], dtype=torch.int32).expand(65536, -1))
        assert (scales == torch.tensor(0.3, dtype=torch.float16)).all()


@pytest.mark.parametrize("largest", LARGEST)
def test_nothing_leaves_the_grid_and_the_outermost_values_stay_on_their_scale(largest):
    """Values at the edge move inwards by a fraction of a step; a value one step inside moves to the edge."""
    inwards = 1000 / 65536
    new, scales = under_all_noise([largest, -largest, largest - 1], 2.0, [2 * inwards, -2 * inwards, -2.0], largest)
    assert (scales == 2).all()
    assert new.abs().max() == largest
    assert int((new[:, 0] == largest).sum()) == 65536 - 1000
    assert int((new[:, 1] == -largest).sum()) == 65536 - 1000
    assert (new[:, 2] == largest).all()


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0, 1, 1000, 65535])
def test_a_block_grows_as_often_as_its_largest_value_is_rounded_out_of_the_grid(largest, sign, share):
    new, scales = under_all_noise([sign * largest, 2], 1.0, [-sign * share / 65536, 0.0], largest)
    grows = scales > 1
    assert int(grows.sum()) == share
    assert (new[~grows] == torch.tensor([sign * largest, 2])).all()
    assert (scales[grows] == smallest_scale(torch.tensor(largest + 1.0), largest)).all()
    assert new.abs().max() <= largest


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beyond", [1, 2, 1000, 16000, 20000.5, 3e6])
def test_growing_is_unbiased_over_all_second_noises(largest, sign, beyond):
    """The exact values are whole codes, so the first noise changes none; beyond 2^14 they may have fractions."""
    scale, codes = 2.0**-8, [sign * largest, 3, -2, 0]
    direction = [-sign * beyond * scale, 0.0, 0.0, 0.0]
    new, scales = under_all_noise(codes, scale, direction, largest, second=None)
    assert scales.unique().numel() == 1
    grown = scales[0].item()
    assert grown == smallest_scale(torch.tensor(scale * (largest + beyond)), largest).item()
    assert new.abs().max() <= largest
    mean = new.double().mean(dim=0) * grown
    for element, code in enumerate([sign * (largest + beyond), 3, -2, 0]):
        # Fractions are multiples of 1/65536, and the quotient is rounded to 24 bits three times; clamping adds no more.
        error = grown * (2**-17 + 3 * 2**-24 * largest)
        assert mean[element].item() == pytest.approx(code * scale, abs=error)


@pytest.mark.parametrize("largest", LARGEST)
def test_both_roundings_together_are_unbiased(largest):
    """Some noise values round the largest value out of the grid; the mean over all pairs of noise values is exact."""
    share = 20000
    codes, direction = [largest, 3], [-share / 65536, 0.0]
    first, scales = under_all_noise(codes, 1.0, direction, largest)
    stays = first[scales == 1].double().sum(dim=0)
    again, grown = under_all_noise([largest, 3], 1.0, [-1.0, 0.0], largest, second=None)
    mean = (stays + share * again.double().mean(dim=0) * grown[0].item()) / 65536
    assert mean.tolist() == pytest.approx(
        [largest + share / 65536, 3], abs=grown[0].item() * (2**-17 + 2**-22 * largest)
    )


def test_a_value_that_is_on_the_grown_grid_stays_under_every_noise():
    """From 7 to 14 steps: the scale doubles, so even codes stay on the grid, and odd ones are rounded up half of the time."""
    new, scales = under_all_noise([7, 4, -2, 3], 0.5, [-3.5, 0.0, 0.0, 0.0], 7, second=None)
    assert (scales == 1.0).all()
    assert (new[:, :3] == torch.tensor([7, 2, -1])).all()
    assert int((new[:, 3] == 2).sum()) == 32768


def test_first_and_second_noise_are_independent():
    first, second = noise_of(KEY, 1 << 18, 0, torch.device("cpu"))
    assert not isinstance(first, int) and not isinstance(second, int)
    for lag in (0, 1, 16, 32):
        pair = torch.stack((first[lag:], second[: len(second) - lag])).double()
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / math.sqrt(1 << 18)  # five standard errors


def test_rounding_to_nearest_puts_ties_up():
    codes = torch.tensor([[0, 0, 0, 0, -1, 5] + [0] * 26])
    direction = torch.zeros(1, 32)
    direction[0, :6] = torch.tensor([-0.5, 0.5, -0.49, 0.51, 0.5, -1.5])
    new, _ = moved(codes, torch.ones(1).half(), direction, (NEAREST, NEAREST), step=1.0, decay=0.0, largest=7)
    assert new[0, :6].tolist() == [1, 0, 0, -1, -1, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_no_scale_reaches_makes_its_block_nan_and_no_other(bad):
    weight = quantize(torch.randn(4, 256), INT8)
    before = dequantize(weight)
    direction = torch.zeros(4, 256)
    direction[1, 3] = bad
    apply_(weight, direction, step=10.0, decay=0.0, key=KEY)
    after = dequantize(weight)
    expected = torch.zeros(4, 256, dtype=torch.bool)
    expected[1, :128] = True
    assert torch.equal(after.isnan(), expected)
    assert torch.equal(after[~expected], before[~expected])
    assert (load_codes(weight)[1, :128] == 0).all()
    apply_(weight, torch.ones(4, 256), step=0.01, decay=0.1, key=KEY)  # NaN stays NaN, as in bfloat16
    assert torch.equal(dequantize(weight).isnan(), expected)


def test_a_block_of_zeros_can_be_left():
    weight = quantize(torch.zeros(1, 32), INT4)
    direction = torch.linspace(-3, 4, 32)[None]
    apply_(weight, direction, step=1e-3, decay=0.0, key=KEY)
    values = dequantize(weight, torch.float32)
    assert (values + 1e-3 * direction).abs().max() <= weight.scales.item()
    assert weight.scales.item() == smallest_scale(torch.tensor(4e-3), 7).item()


# Against exact arithmetic


def floors(value: Fraction, noise: int, slack: Fraction) -> set[int]:
    """The results to which a value may be rounded if its fixed point number is off by at most `slack`."""
    return {math.floor(value + Fraction(noise, 65536) + sign * slack) for sign in (-1, 1)}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("step", [1e-4, 0.02, 1.0])
def test_new_codes_are_those_of_exact_arithmetic(grid, decay, step):
    generator = torch.Generator().manual_seed(7)
    blocks, largest = 20, grid.largest
    codes = torch.randint(-largest, largest + 1, (blocks, 32), generator=generator, dtype=torch.int32)
    scales = (torch.rand(blocks, generator=generator) * 0.1 + 1e-3).half()
    direction = torch.randn(blocks, 32, generator=generator)
    first, second = torch.randint(0, 65536, (2, blocks, 32), generator=generator, dtype=torch.int32)
    step, decay = (torch.tensor(x, dtype=torch.float32).item() for x in (step, decay))
    got, new_scales = moved(codes, scales, direction, (first, second), step=step, decay=decay, largest=largest)
    grown = 0
    for b in range(blocks):
        old, new = Fraction(scales[b].item()), Fraction(new_scales[b].item())
        rounded = []
        for code, move, noise in zip(codes[b].tolist(), direction[b].tolist(), first[b].tolist(), strict=True):
            distance = Fraction(move) * Fraction(step) / old + code * Fraction(decay)
            # Half a unit in the fixed point number's last place, and the float32 roundings of the distance.
            rounded.append(floors(code - distance, noise, Fraction(1, 131072) + 4 * abs(distance) / 2**24))
        if max(abs(code) for choices in rounded for code in choices) <= largest:
            assert new == old
            assert all(code in choices for code, choices in zip(got[b].tolist(), rounded, strict=True))
            continue
        (farthest,) = {max(max(map(abs, choices)) for choices in rounded)}
        grown += 1
        assert new == Fraction(smallest_scale(torch.tensor(float(farthest * old)), largest).item())
        for code, choices, noise in zip(got[b].tolist(), rounded, second[b].tolist(), strict=True):
            slack = Fraction(1, 131072) + 4 * Fraction(largest, 2**24)
            assert code in set().union(*(floors(c * old / new, noise, slack) for c in choices))
    assert step != 1.0 or grown > 0


# Whole weights


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_rows_of_a_shard_get_the_bits_of_the_whole(grid):
    values, direction = torch.randn(30, 320), torch.randn(30, 320)
    whole = quantize(values, grid)
    part = copy_of(whole.rows(11, 25))
    apply_(whole, direction, step=0.01, decay=0.001, key=KEY)
    apply_(part, direction[11:25], step=0.01, decay=0.001, key=KEY, offset=11 * 320)
    assert same(part, whole.rows(11, 25))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_strided_directions_stacks_and_tensors_as_numbers_change_no_bit(grid):
    values, direction = torch.randn(3, 10, 64), torch.randn(3, 64, 10).transpose(1, 2)
    first, second = quantize(values, grid), quantize(values.view(30, 64), grid)
    apply_(first, direction, step=0.01, decay=0.001, key=KEY)
    numbers = {"step": torch.tensor(0.01), "decay": torch.tensor(0.001)}
    apply_(second, direction.reshape(30, 64), **numbers, key=KEY)
    assert torch.equal(dequantize(first).view(30, 64), dequantize(second))


@pytest.mark.parametrize("grid", [INT8, INT12], ids=lambda grid: grid.name)
def test_the_noise_is_that_of_the_global_element_index(grid):
    torch.manual_seed(0)
    weight = quantize(torch.randn(4, 128), grid)
    codes, direction = load_codes(weight), torch.randn(4, 128)
    first, second = (noise_from_key(key, 512, offset=640).view(4, 1, 128) for key in (KEY, (KEY[1], KEY[0])))
    blocks = codes.view(4, 1, 128), weight.scales, direction.view(4, 1, 128)
    expected, scales = moved(*blocks, (first, second), step=1.0, decay=0.0, largest=grid.largest)
    assert (scales != weight.scales).any()
    apply_(weight, direction, step=1.0, decay=0.0, key=KEY, offset=640)
    assert torch.equal(load_codes(weight), expected.view(4, 128))


def test_many_small_steps_arrive_where_they_should_on_average():
    """Steps of a hundredth of a grid step: rounded to nearest, nothing moves; with noise, the mean of 4096 elements does."""
    values = torch.ones(32, 128)
    values[:, ::32] = 2.0
    steps, step = 100, 2.0 / 127 / 100
    stochastic, nearest = quantize(values, INT8), quantize(values, INT8)
    start = dequantize(nearest, torch.float32)
    for number in range(steps):
        apply_(stochastic, torch.ones(32, 128), step=step, decay=0.0, key=noise_key(0, number, 0))
        apply_(nearest, torch.ones(32, 128), step=step, decay=0.0, key=None)
    assert torch.equal(dequantize(nearest, torch.float32), start)
    travelled = (start - dequantize(stochastic, torch.float32)).double().mean().item()
    # Each step's noise has a variance of at most p(1 - p) grid steps squared, p = 1/100; five standard errors.
    error = 5 * stochastic.scales[0, 0].item() * math.sqrt(steps * 0.01 / 4096)
    assert travelled == pytest.approx(steps * step, abs=error)
