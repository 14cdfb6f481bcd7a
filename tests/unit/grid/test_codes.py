"""Storage on a grid: scales, rounding to nearest, packing, and reading back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sbft.grid import codes
from sbft.grid.codes import dequantize, empty, load_codes, quantize, smallest_scale, square_sum, store_codes
from sbft.grid.formats import GRIDS, INT4, INT8, INT12, Grid, fits

INT6 = Grid("int6", 31, 128)
ALL = [*GRIDS.values(), INT6, Grid("int4 per 64", 7, 64), Grid("int8 per 32", 127, 32)]
SHAPES = [(1, 32), (5, 96), (3, 576), (2, 3, 160), (2, 2, 3, 64), (40, 1536)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values, with rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def all_positive_float16() -> np.ndarray:
    return np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)


@pytest.mark.parametrize("largest", [7, 31, 127, 2047])
def test_the_scale_is_the_smallest_float16_that_reaches_the_largest_value(largest):
    scales = all_positive_float16()
    reach = (scales * largest).astype(np.float32)
    assert (reach.astype(np.float64) == scales * largest).all()  # exact, so the expected scale is known
    for values, wanted in (
        (reach, scales),
        (np.nextafter(reach, np.float32(0)), scales),
        (np.nextafter(reach, np.float32(np.inf))[:-1], scales[1:]),
    ):
        got = smallest_scale(torch.from_numpy(values), largest)
        assert got.dtype == torch.float16
        assert (got.double().numpy() == wanted).all()


def test_the_scale_of_nothing_is_the_smallest_one_and_of_too_much_none():
    beyond = np.nextafter(np.float32(65504 * 127), np.float32(np.inf))
    values = torch.tensor([0.0, 1e-38, 65504.0 * 127, float(beyond), torch.inf, torch.nan])
    scales = smallest_scale(values, 127).tolist()
    assert scales[:3] == [2.0**-24, 2.0**-24, 65504.0]
    assert all(np.isnan(scale) for scale in scales[3:])


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_value_is_within_half_a_step_and_none_is_clamped(grid, shape, dtype):
    values = drawn(shape, dtype)
    weight = quantize(values, grid)
    assert weight.shape == values.shape
    assert weight.block == np.gcd(shape[-1], grid.block)
    stored = load_codes(weight)
    blocks = stored.unflatten(-1, (-1, weight.block))
    assert stored.abs().max() <= grid.largest
    normal = weight.scales >= 2.0**-14  # at most 2^-10 above the needed scale
    assert (blocks.abs().amax(dim=-1)[normal] > 0.99 * grid.largest).all()
    scale = weight.scales.double().repeat_interleave(weight.block, dim=-1)
    error = (stored * scale - values.double()).abs()
    assert (error <= scale * (0.5 + 2.0**-12)).all()  # the quotient is rounded once, to 24 bits
    exact = stored.double() * scale
    assert torch.equal(dequantize(weight, torch.float32).double(), exact)
    assert torch.equal(dequantize(weight), exact.to(torch.bfloat16))


def test_ties_go_to_even_codes():
    values = torch.zeros(1, 32)
    values[0, :6] = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert load_codes(quantize(values, INT4))[0, :6].tolist() == [7, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
def test_every_code_is_stored_and_found_again_in_every_place(grid):
    range_ = torch.arange(-grid.largest, grid.largest + 1, dtype=torch.int32)
    weight = empty(grid, (len(range_), 64))
    shifted = torch.stack([range_.roll(place) for place in range(64)], dim=-1)
    store_codes(weight, shifted)
    assert torch.equal(load_codes(weight), shifted)
    assert sum(tensor.nbytes for tensor in weight.tensors.values()) == grid.size_bytes(weight.shape)


def test_four_bits_are_packed_as_in_q4_0():
    gguf = pytest.importorskip("gguf")
    weight = quantize(drawn((6, 96)), INT4)
    blocks = torch.cat((weight.scales[..., None].view(torch.uint8), weight.codes.view(6, 3, 16)), dim=-1)
    read = gguf.quants.dequantize(blocks.flatten(-2).numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(read), dequantize(weight, torch.float32))


def test_twelve_bits_are_eight_and_four():
    weight = empty(INT12, (1, 32))
    wanted = torch.tensor([-2047, -16, -15, -1, 0, 1, 15, 16] + [2047] * 24)[None]
    store_codes(weight, wanted)
    assert weight.codes[0, :8].tolist() == [-128, -1, -1, -1, 0, 0, 0, 1]
    assert weight.low is not None
    low = wanted[0] % 16
    assert weight.low[0].tolist() == [int(low[j] + 16 * low[16 + j]) for j in range(16)]


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.name)
def test_rows_and_gathered_rows_are_those_of_the_whole(grid):
    for shape in [(50, 96), (6, 5, 64)]:
        weight = quantize(drawn(shape), grid)
        whole = dequantize(weight)
        assert torch.equal(dequantize(weight.rows(2, 5)), whole[2:5])
        index = torch.tensor([[4, 0, 4], [1, 5, 2]])
        assert torch.equal(dequantize(weight.gather(index)), whole[index])
        into = torch.full((3, *shape[1:]), torch.nan, dtype=torch.bfloat16)
        assert dequantize(weight.rows(1, 4), out=into) is into
        assert torch.equal(into, whole[1:4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65505.0 * 127])
def test_what_a_block_cannot_hold_makes_it_nan_and_no_other(bad):
    values = drawn((4, 256))
    values[2, 130] = bad
    weight = quantize(values, INT8)
    expected = torch.zeros(4, 256, dtype=torch.bool)
    expected[2, 128:] = True
    assert torch.equal(dequantize(weight).isnan(), expected)
    assert torch.equal(dequantize(weight, torch.float32).isnan(), expected)
    assert (load_codes(weight)[2, 128:] == 0).all()


def test_a_block_of_zeros_stays_zero():
    weight = quantize(torch.zeros(2, 64), INT4)
    assert (weight.scales == 2.0**-24).all()
    assert (dequantize(weight, torch.float32) == 0).all()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_the_number_of_rows_handled_at_once_changes_no_bit(grid, monkeypatch):
    values = drawn((37, 320))
    expected = quantize(values, grid)
    monkeypatch.setattr(codes, "_CHUNK_ELEMENTS", 1000)
    got = quantize(values, grid)
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor)
    assert torch.equal(dequantize(got), dequantize(expected))


def test_the_sum_of_squares_is_that_of_the_values():
    weight = quantize(drawn((30, 320)), INT12)
    exact = dequantize(weight, torch.float32).double().square().sum()
    torch.testing.assert_close(square_sum(weight).double(), exact, rtol=1e-6, atol=0)


def test_which_shapes_fit():
    assert fits((1, 32)) and fits((2, 3, 96))
    assert not fits((32,)) and not fits((4, 48)) and not fits((0, 32)) and not fits(())
    with pytest.raises(ValueError, match=r"shape \(4, 48\)"):
        quantize(torch.zeros(4, 48), INT8)
    with pytest.raises(ValueError, match="48 elements"):
        INT8.block_of(48)


@pytest.mark.parametrize(("largest", "block"), [(0, 32), (2048, 32), (7, 16), (7, 96)])
def test_grids_that_cannot_be_stored_are_refused(largest, block):
    with pytest.raises(ValueError, match="must be"):
        Grid("bad", largest, block)


def test_bytes_per_weight():
    assert [grid.size_bytes((1024, 1024)) / 2**20 for grid in (INT4, INT8, INT12)] == [0.5625, 1.015625, 1.515625]
