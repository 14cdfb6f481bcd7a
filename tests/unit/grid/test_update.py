"""Updates on a grid, proved by enumerating all noise values, and against an oracle in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sbft.grid.codes import Quantized, dequantize, load_codes, quantize, smallest_scale
from sbft.grid.formats import GRIDS, INT4, INT8, INT12
from sbft.grid.update import NEAREST, apply_, moved
from sbft.rounding import noise_from_key, noise_key

ALL_NOISE = torch.arange(65536, dtype=torch.int32)
KEY = noise_key(1, 2, 3)
LARGEST = [grid.largest for grid in GRIDS.values()]


def under_all_noise(
    codes: list[int], scale: float, direction: list[float], largest: int, *, step: float = 1.0, decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One block (padded to 32 elements) updated under every noise: codes (65536, elements) and scales (65536,)."""
    count = len(codes)
    block = torch.zeros(65536, 32, dtype=torch.int32)
    block[:, :count] = torch.tensor(codes, dtype=torch.int32)
    moves = torch.zeros(65536, 32)
    moves[:, :count] = torch.tensor(direction)
    noise = ALL_NOISE[:, None].expand(-1, 32)
    scales = torch.full((65536,), scale, dtype=torch.float16)
    new_codes, new_scales = moved(block, scales, moves, noise, step=step, decay=decay, largest=largest)
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
    """Towards the inside by any share; and up to the edge itself, from one step inside."""
    inwards = 1000 / 65536
    new, scales = under_all_noise([largest, -largest, largest - 1], 2.0, [2 * inwards, -2 * inwards, -2.0], largest)
    assert (scales == 2).all()
    assert new.abs().max() == largest
    assert int((new[:, 0] == largest).sum()) == 65536 - 1000
    assert int((new[:, 1] == -largest).sum()) == 65536 - 1000
    assert (new[:, 2] == largest).all()


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beyond", [1 / 65536, 0.25, 1.0, 1000.7])
def test_a_block_that_would_be_left_grows_whatever_the_noise_and_stays_unbiased(largest, sign, beyond):
    scale, codes = 0.25, [sign * largest, 3, -2, 0]
    beyond = max(beyond, largest * 2.0**-18)  # what float32 can tell from the largest code, for all d
    direction = [-sign * beyond * scale, 0.1 * scale, -0.3 * scale, 0.0]
    new, scales = under_all_noise(codes, scale, direction, largest)
    wanted = [code - move / scale for code, move in zip(codes, direction, strict=True)]
    reached = scale * (largest + beyond)
    assert scales.unique().numel() == 1
    grown = scales[0].item()
    assert grown * largest >= reached * (1 - 2**-23)
    assert grown <= max(reached / largest * (1 + 2**-10), 2**-24)
    assert new.abs().max() <= largest
    mean = new.double().mean(dim=0) * grown
    for element, value in enumerate(wanted):
        # Shares come in 1/65536, and quotients are rounded to 24 bits four times; the clamp takes back no more.
        error = grown * (2**-17 + 4 * 2**-24 * abs(value))
        assert mean[element].item() == pytest.approx(value * scale, abs=error)


def test_a_value_that_is_on_the_grown_grid_stays_under_every_noise():
    """From 7 to 14 steps: the scale doubles, so even codes remain on the grid, and odd ones go up half of the time."""
    new, scales = under_all_noise([7, 4, -2, 3], 0.5, [-3.5, 0.0, 0.0, 0.0], 7)
    assert (scales == 1.0).all()
    assert (new[:, :3] == torch.tensor([7, 2, -1])).all()
    assert int((new[:, 3] == 2).sum()) == 32768


def test_rounding_to_nearest_puts_ties_up():
    codes = torch.tensor([[0, 0, 0, 0, -1, 5] + [0] * 26])
    direction = torch.zeros(1, 32)
    direction[0, :6] = torch.tensor([-0.5, 0.5, -0.49, 0.51, 0.5, -1.5])
    new, _ = moved(codes, torch.ones(1).half(), direction, NEAREST, step=1.0, decay=0.0, largest=7)
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


def oracle(
    codes: list[int], scale: float, direction: list[float], noise: list[int], step: float, decay: float, largest: int
) -> tuple[list[Fraction], bool]:
    """The wanted values in units of codes, exactly, and whether one of them is beyond the grid."""
    wanted = [
        code - (Fraction(move) * Fraction(step) / Fraction(scale) + code * Fraction(decay))
        for code, move in zip(codes, direction, strict=True)
    ]
    return wanted, any(abs(value) > largest for value in wanted)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("step", [1e-4, 0.02, 1.0])
def test_new_codes_are_those_of_exact_arithmetic(grid, decay, step):
    generator = torch.Generator().manual_seed(7)
    blocks = 20
    codes = torch.randint(-grid.largest, grid.largest + 1, (blocks, 32), generator=generator, dtype=torch.int32)
    scales = (torch.rand(blocks, generator=generator) * 0.1 + 1e-3).half()
    direction = torch.randn(blocks, 32, generator=generator)
    noise = torch.randint(0, 65536, (blocks, 32), generator=generator, dtype=torch.int32)
    step, decay = (torch.tensor(x, dtype=torch.float32).item() for x in (step, decay))
    got, new_scales = moved(codes, scales, direction, noise, step=step, decay=decay, largest=grid.largest)
    grown = 0
    for b in range(blocks):
        scale = scales[b].item()
        wanted, grows = oracle(
            codes[b].tolist(), scale, direction[b].tolist(), noise[b].tolist(), step, decay, grid.largest
        )
        new_scale = new_scales[b].item()
        grown += grows
        assert (new_scale > scale) == grows
        if grows:
            reached = max(abs(value) for value in wanted) * Fraction(scale)
            nearby = [
                smallest_scale(torch.tensor(float(reached) * f), grid.largest).item() for f in (1 - 1e-6, 1 + 1e-6)
            ]
            assert nearby[0] <= new_scale <= nearby[1]
        for code, value, bits in zip(got[b].tolist(), wanted, noise[b].tolist(), strict=True):
            value = value * Fraction(scale) / Fraction(new_scale)
            exact = value + Fraction(bits, 65536)
            # Half a share from rint, and float32's roundings of what was subtracted or of the whole.
            slack = Fraction(1, 131072) + 8 * abs(value - (0 if grows else code)) / 2**24 + Fraction(1, 2**20)
            assert math.floor(exact - slack) <= code <= math.floor(exact + slack)
    assert grown > 0 if step == 1.0 else True


# Whole weights


def copy_of(weight: Quantized) -> Quantized:
    return weight.with_tensors(
        weight.codes.clone(), None if weight.low is None else weight.low.clone(), weight.scales.clone()
    )


def same(one: Quantized, other: Quantized) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


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
    weight = quantize(torch.randn(4, 128), grid)
    codes, direction = load_codes(weight), torch.randn(4, 128) * 0.1
    noise = noise_from_key(KEY, 512, offset=640).view(4, 1, 128)
    expected, _ = moved(
        codes.view(4, 1, 128),
        weight.scales,
        direction.view(4, 1, 128),
        noise,
        step=0.1,
        decay=0.0,
        largest=grid.largest,
    )
    apply_(weight, direction, step=0.1, decay=0.0, key=KEY, offset=640)
    assert torch.equal(load_codes(weight), expected.view(4, 128))


def test_many_small_steps_arrive_where_they_should_on_average():
    """Steps of a hundredth of the grid's: to nearest none moves; with noise the mean of 4096 elements follows."""
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
