"""The Triton kernels on weights on a grid against the reference; `test_kernels_cuda` runs this in processes of its own.

With `TRITON_INTERPRET=1` in the environment on CPU tensors, else on the GPU.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.unit.optim import cuda_interpreter  # noqa: F401

from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sbft.grid import codes  # noqa: E402
from sbft.grid import cuda as grid_cuda  # noqa: E402
from sbft.grid.codes import Quantized, load_codes, quantize  # noqa: E402
from sbft.grid.formats import GRIDS, INT4, INT8, Grid  # noqa: E402
from sbft.optim.kernels import cuda, cuda_plans, reference  # noqa: E402
from sbft.optim.matrix import whole_part  # noqa: E402
from sbft.rounding import noise_key  # noqa: E402
from tests.unit.grid.quantized import copy_of, same  # noqa: E402
from tests.unit.optim.updates import ADAFACTOR, SGD, update  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KEY = noise_key(seed=11, step=5, parameter=3)
GRIDS_TRIED = [*GRIDS.values(), Grid("int8 per 32", 127, 32)]
RULES = ["factored", "full", "adamw", "sgd", "sgd-momentum"]
pytestmark = pytest.mark.filterwarnings("ignore")  # NumPy warns where the hash wraps around, as intended


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, time grows with the size of a tile; with smaller tiles, small tensors have several."""
    if INTERPRETED:
        for name, value in {"TILE_COLUMNS": 128, "BLOCK": 512}.items():
            monkeypatch.setattr(cuda_plans, name, value)
        for cached in (cuda_plans.factored_plan, cuda_plans.factored_launches, cuda_plans.line_launches):
            cached.cache_clear()


def randn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("grid", GRIDS_TRIED, ids=lambda grid: grid.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_are_those_of_the_definition(grid: Grid, dtype: torch.dtype) -> None:
    values = randn((5, 33, 160), 1)  # not a whole number of programs
    values[2, 7, 40] = torch.nan
    weight = quantize(values, grid)
    expected = codes.dequantize(weight, dtype)
    assert expected.isnan().any()
    into = torch.empty_like(expected)
    assert grid_cuda.dequantize(weight, out=into) is into
    index = torch.tensor([[3, 0], [3, 4]], device=DEVICE)
    for made, wanted in [
        (grid_cuda.dequantize(weight, dtype), expected),
        (into, expected),
        (grid_cuda.dequantize_entries(weight, index, dtype), expected[index]),
        (grid_cuda.dequantize(weight.rows(1, 3), dtype), expected[1:3]),
    ]:
        torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)
    assert grid_cuda.dequantize(weight.rows(1, 1), dtype).shape == (0, 33, 160)


@pytest.mark.parametrize("grid", GRIDS_TRIED, ids=lambda grid: grid.name)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(70, 160), (2, 33, 192)], ids=str)
def test_triton_and_reference_agree(grid: Grid, rule: str, shape: tuple[int, ...]) -> None:
    for key, dtype, turned in [(KEY, torch.bfloat16, False), (None, torch.float32, True)]:
        start, grad = quantize(randn(shape, 1), grid), randn(shape, 2).to(dtype)
        if turned:
            grad = grad.mT.contiguous().mT
        expected, got = copy_of(start), copy_of(start)
        wanted, made = (update(b, rule, w, grad, key) for b, w in ((reference, expected), (cuda, got)))
        for name, value in wanted.items():  # sums in a different order
            torch.testing.assert_close(made[name], value, rtol=2e-5, atol=0)
        if rule in ("factored", "full"):
            assert (load_codes(got) - load_codes(expected)).abs().max() <= grid.largest / 100 + 1
            assert (load_codes(got) != load_codes(expected)).float().mean() < 2e-3
        else:
            assert same(got, expected)
        assert key is None or not same(got, start)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_given_the_same_sums_adafactors_codes_are_equal(grid: Grid, key: Any) -> None:
    """With squares of one, and with codes and scales that are powers of two, every sum is exact in any order."""
    shape = (40, 160)
    signs = torch.where(randn(shape, 2) > 0, 1, -1)
    start = codes.empty(grid, shape, DEVICE)
    codes.store_codes(start, signs * (grid.largest + 1) // 2)
    start.scales.fill_(2.0**-12)
    made = []
    for backend in (reference, cuda):
        weight, row, column = copy_of(start), torch.zeros(40, device=DEVICE), torch.zeros(160, device=DEVICE)
        arguments = (weight, -signs.float(), row, column, torch.zeros((), device=DEVICE), None)
        backend.adafactor_factored(*arguments, **{**ADAFACTOR, "lr": 0.0123}, key=key)
        made.append(weight)
    assert same(*made)
    assert not same(made[0], start) or (key is None and grid is INT4)  # 4.03 steps round to 4


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_extreme_directions_are_rounded_as_defined(grid: Grid) -> None:
    """Blocks that grow a little, a lot, beyond fixed point, and beyond float16; and blocks of zeros."""
    values = randn((64, 128), 1)
    values[::3] = 0
    grad = randn((64, 128), 2) * torch.logspace(-12, 18, 64, device=DEVICE)[:, None]
    start = quantize(values, grid)
    for key in (KEY, None):
        expected, got = copy_of(start), copy_of(start)
        reference.sgd(expected, grad, None, None, **SGD, key=key)
        cuda.sgd(got, grad, None, None, **SGD, key=key)
        assert same(got, expected)
    grown = expected.scales.float() / start.scales.float()
    assert grown.isnan().any() and (grown == 1).any() and ((grown > 1) & (grown < 1.5)).any()


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_is_not_finite_changes_nothing(rule: str) -> None:
    start, grad = quantize(randn((70, 160), 1), INT8), randn((70, 160), 2)
    grad[3, 5] = torch.nan
    weight = copy_of(start)
    update(cuda, rule, weight, grad, KEY)
    assert same(weight, start)


def test_the_carried_sum_of_squares_is_the_one_that_would_be_taken_anew() -> None:
    start, grad = quantize(randn((40, 160), 1), INT8), randn((40, 160), 2)

    def run(carry: bool) -> Quantized:
        weight, total = copy_of(start), None
        state = [torch.zeros(size, device=DEVICE) for size in (40, 160, ())]
        for _ in range(3):
            _, total = cuda.adafactor_factored(
                weight, grad, *state, total if carry else None, **{**ADAFACTOR, "lr": 0.1}, key=KEY
            )
            torch.testing.assert_close(total, codes.square_sum(weight), rtol=1e-5, atol=0)
        return weight

    assert same(run(carry=True), run(carry=False))


def test_rows_that_are_updated_apart_get_the_bits_of_the_whole() -> None:
    start, grad = quantize(randn((30, 320), 1), INT8), randn((30, 320), 2)
    whole, part = copy_of(start), copy_of(start.rows(11, 25))
    cuda.sgd(whole, grad, None, None, **SGD, key=KEY)
    shard = whole_part(torch.Size((30, 320)), 11 * 320)
    cuda.sgd(part, grad[11:25], None, None, **SGD, key=KEY, shard=shard)
    assert same(part, whole.rows(11, 25))


def test_numbers_in_the_devices_memory_change_no_bit() -> None:
    """Updates that a CUDA graph replays read them there."""
    start, grad = quantize(randn((40, 160), 1), INT8), randn((40, 160), 2)
    expected, got = copy_of(start), copy_of(start)
    cuda.sgd(expected, grad, None, None, **SGD, key=KEY)
    words = tuple(torch.tensor(word - (1 << 32) * (word >> 31), dtype=torch.int32, device=DEVICE) for word in KEY)
    rate = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    cuda.sgd(got, grad, None, None, **{**SGD, "lr": rate}, key=words)
    assert same(got, expected)
