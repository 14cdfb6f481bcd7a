"""Updates of weights on a grid: the compiled ones against the reference, and both against updates of plain weights."""

from __future__ import annotations

import ctypes
import functools
import platform
import tempfile
from pathlib import Path

import pytest
import torch

from sbft.grid import codes
from sbft.grid import cpu as grid_cpu
from sbft.grid.codes import Quantized, dequantize, load_codes, quantize
from sbft.grid.formats import GRIDS, INT4, INT8, INT12, Grid
from sbft.optim.kernels import cpu, reference
from sbft.optim.matrix import whole_part
from sbft.rounding import noise_key
from tests.unit.grid.quantized import copy_of, same
from tests.unit.optim.test_kernels_cpu import strided
from tests.unit.optim.updates import ADAFACTOR, SGD, update

KEY = noise_key(1, 2, 3)
RULES = ["factored", "full", "adamw", "adamw-no-momentum", "sgd", "sgd-momentum"]
SHAPES = [(130, 160), (200, 1536), (3, 128, 192), (2, 2, 130, 128)]
TRIED = [*GRIDS.values(), Grid("int6", 31, 128), Grid("int4 per 64", 7, 64), Grid("int8 per 32", 127, 32)]


@pytest.mark.parametrize("grid", TRIED, ids=lambda grid: grid.name)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_and_reference_updates_agree(grid, rule, shape):
    for layout, dtype, key in [
        ("contiguous", torch.bfloat16, KEY),
        ("transposed", torch.float32, KEY),
        ("every other column", torch.bfloat16, None),
    ]:
        start = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), grid)
        grad = strided(shape, layout, dtype)
        expected, got = copy_of(start), copy_of(start)
        states = [update(backend, rule, w, grad, key) for backend, w in ((reference, expected), (cpu, got))]
        for name, value in states[0].items():  # sums of up to 300,000 squares in a different order
            torch.testing.assert_close(states[1][name], value, rtol=2e-5, atol=0)
        if rule in ("factored", "full"):  # the step differs in its last digits
            assert (load_codes(got) - load_codes(expected)).abs().max() <= grid.largest / 100 + 1
            assert (load_codes(got) != load_codes(expected)).float().mean() < 2e-3
        else:  # no sums: the same bits
            assert same(got, expected)
        assert key is None or not same(got, start)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(130, 160), (3, 128, 192)], ids=str)
def test_given_the_same_sums_adafactors_codes_are_equal(grid, key, shape):
    """With squares of one, and with codes and scales that are powers of two, every sum is exact in any order."""
    signs = torch.where(torch.randn(shape, generator=torch.Generator().manual_seed(2)) > 0, 1, -1)
    start = codes.empty(grid, shape)
    codes.store_codes(start, signs * (grid.largest + 1) // 2)
    start.scales.fill_(2.0**-12)
    made = []
    for backend in (reference, cpu):
        weight, row, column = copy_of(start), torch.zeros(shape[:-1]), torch.zeros(shape[:-2] + shape[-1:])
        arguments = (weight, -signs.float(), row, column, torch.zeros(()), None)
        backend.adafactor_factored(*arguments, **{**ADAFACTOR, "lr": 0.0123}, key=key)
        made.append(weight)
    assert same(*made)
    assert not same(made[0], start) or (key is None and grid is INT4)  # 4.03 steps round to 4


# SSE only; AVX2; AVX-512 without bfloat16. Each library takes some seconds to compile, so most are left to the long tests.
SHORT = {(INT4, "x86-64")}
BUILDS = [
    pytest.param(grid, instructions, marks=[] if (grid, instructions) in SHORT else pytest.mark.long)
    for grid in GRIDS.values()
    for instructions in ("x86-64", "haswell", "skylake-avx512")
    if platform.machine() == "x86_64"
]


@functools.cache
def built_for(instructions: str, bits: int) -> ctypes.CDLL:
    flags = [f"-march={instructions}" if flag == "-march=native" else flag for flag in grid_cpu.FLAGS]
    return cpu.load(cpu.build(bits, Path(tempfile.mkdtemp()), flags))


@pytest.mark.parametrize(("grid", "instructions"), BUILDS)
def test_other_processors_give_the_same_bits(grid, instructions, monkeypatch):
    if instructions == "skylake-avx512" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    values = torch.randn(130, 160, generator=torch.Generator().manual_seed(1))
    values[3] *= 1e-9  # blocks that overflow by more than fixed point numbers can represent
    start, grad = quantize(values, grid), strided((130, 160), "contiguous", torch.float32)
    grad[7, 5] = 1e30
    made = []
    for library in (cpu.library(grid.bits), built_for(instructions, grid.bits)):
        monkeypatch.setattr(cpu, "library", lambda bits, library=library: library)
        weights = [copy_of(start) for _ in RULES]
        states = [
            update(cpu, rule, weight, grad.clamp(max=1e15), KEY, lr=0.1)
            for rule, weight in zip(RULES, weights, strict=True)
        ]
        made.append((weights, states))
    for one, other in zip(*(weights for weights, _ in made), strict=True):
        assert same(one, other)
    for one, other in zip(*(states for _, states in made), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_extreme_directions_are_rounded_as_defined(grid):
    """Finite directions of all sizes: blocks that grow a little, a lot, beyond fixed point, and beyond float16."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    values[::3] = 0
    sizes = torch.logspace(-12, 18, 64)[:, None]
    grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * sizes
    start = quantize(values, grid)
    for key in (KEY, None):
        expected, got = copy_of(start), copy_of(start)
        reference.sgd(expected, grad, None, None, **SGD, key=key)
        cpu.sgd(got, grad, None, None, **SGD, key=key)
        assert same(got, expected)
    grown = expected.scales.float() / start.scales.float()
    assert grown.isnan().any() and (grown == 1).any() and ((grown > 1) & (grown < 1.5)).any()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(grid, bad):
    start, grad = quantize(torch.randn(130, 160), grid), torch.randn(130, 160)
    grad[3, 5] = bad
    for rule in RULES:
        for backend in (reference, cpu):
            weight = copy_of(start)
            update(backend, rule, weight, grad, KEY)
            assert same(weight, start)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [INT12], ids=lambda grid: grid.name)
def test_the_mean_over_keys_is_the_update_of_plain_float32(grid, rule):
    start, grad = quantize(torch.randn(128, 128), grid), torch.randn(128, 128)
    plain = dequantize(start, torch.float32)
    update(cpu, rule, plain, grad, None)
    total = torch.zeros(128, 128)
    for number in range(64):
        weight = copy_of(start)
        update(cpu, rule, weight, grad, noise_key(0, number, 0))
        total += dequantize(weight, torch.float32)
    step = start.scales.float().repeat_interleave(128, dim=1) * 1.02  # some blocks grow a little
    difference = (total / 64 - plain) / step
    # Each mean of 64 has a standard error of at most 1/16 of a step (1/11 if the block also grows); six standard errors.
    assert difference.abs().max() < 6 / 11
    assert difference.mean().abs() < 6 / 11 / 128  # the mean of 16,384


@pytest.mark.parametrize("shape", [(513, 576), (3, 130, 192)], ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_the_number_of_threads_changes_no_bit(shape, grid, monkeypatch):
    monkeypatch.setattr("sbft.grid.cpu.ELEMENTS_PER_THREAD", 1)
    start, grad = quantize(torch.randn(shape), grid), torch.randn(shape).bfloat16()
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = copy_of(start)
            update(cpu, "factored", weight, grad, KEY)
            made.append(weight)
    finally:
        torch.set_num_threads(threads)
    assert same(made[0], made[1]) and same(made[0], made[2])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("rule", ["factored", "full"])
def test_the_carried_sum_of_squares_is_the_one_that_would_be_taken_anew(grid, rule):
    shape = (3, 130, 192)
    start, grad = quantize(torch.randn(shape), grid), torch.randn(shape).bfloat16()
    kernel = cpu.adafactor_factored if rule == "factored" else cpu.adafactor_full
    sizes = [shape[:-1], (3, 192)] if rule == "factored" else [shape]

    def run(carry: bool) -> Quantized:
        weight, state, total = copy_of(start), [torch.zeros(size) for size in (*sizes, ())], None
        for _ in range(4):
            _, total = kernel(weight, grad, *state, total if carry else None, **{**ADAFACTOR, "lr": 0.1}, key=KEY)
            exact = codes.dequantize(weight, torch.float32).double().square().sum().item()
            assert total == pytest.approx(exact, rel=1e-5)
        return weight

    assert same(run(carry=True), run(carry=False))


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
def test_rows_that_are_updated_apart_get_the_bits_of_the_whole(backend):
    start, grad = quantize(torch.randn(30, 320), INT8), torch.randn(30, 320)
    whole, part = copy_of(start), copy_of(start.rows(11, 25))
    backend.sgd(whole, grad, None, None, **SGD, key=KEY)
    backend.sgd(part, grad[11:25], None, None, **SGD, key=KEY, shard=whole_part(torch.Size((30, 320)), 11 * 320))
    assert same(part, whole.rows(11, 25))


def test_wide_rows_are_cut_between_blocks_by_the_reference():
    start, grad = quantize(torch.randn(3, 20_480), INT4), torch.randn(3, 20_480)
    expected, got = copy_of(start), copy_of(start)
    reference.sgd(expected, grad, None, None, **SGD, key=KEY)
    cpu.sgd(got, grad, None, None, **SGD, key=KEY)
    assert same(got, expected)


def test_large_blocks_fall_back_to_the_reference():
    start, grad = quantize(torch.randn(10, 512), Grid("int8 per 256", 127, 256)), torch.randn(10, 512)
    expected, got = copy_of(start), copy_of(start)
    reference.sgd(expected, grad, None, None, **SGD, key=KEY)
    cpu.sgd(got, grad, None, None, **SGD, key=KEY)
    assert same(got, expected)
