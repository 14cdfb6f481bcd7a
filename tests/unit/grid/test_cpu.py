"""The compiled code against the definition: the same bits, whatever vector instructions the processor has."""

from __future__ import annotations

import ctypes
import functools
import platform
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbft.grid import codes, cpu
from sbft.grid.codes import load_codes
from sbft.grid.formats import GRIDS, INT8, Grid
from tests.unit.grid.quantized import same

GRIDS_TRIED = [*GRIDS.values(), Grid("int6", 31, 128), Grid("int4 per 64", 7, 64), Grid("int12 per 512", 2047, 512)]
SHAPES = [(1, 32), (7, 96), (130, 576), (2, 3, 160), (50, 1536), (3, 2048)]
INSTRUCTIONS = ["native"]
if platform.machine() == "x86_64":  # SSE only; AVX2; AVX-512 without conversions to bfloat16
    INSTRUCTIONS += ["x86-64", "haswell", "skylake-avx512"]


@functools.cache
def built_for(instructions: str) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    flags = [f"-march={instructions}" if flag == "-march=native" else flag for flag in cpu.FLAGS]
    return cpu.load(cpu.build(folder, flags))


@pytest.fixture(params=INSTRUCTIONS)
def compiled(request, monkeypatch):
    if request.param == "skylake-avx512" and "avx512bw" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    library = built_for(request.param)
    monkeypatch.setattr(cpu, "library", lambda: library)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.randn(*shape[:-1], 1, generator=generator).mul(4).exp()
    values = torch.randn(shape, generator=generator) * size
    values.view(-1)[3] = torch.nan if shape[0] == 3 else 0.0
    return values.to(dtype)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are the same, except the payloads of NaNs."""
    bits = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    different = one.view(bits) != other.view(bits)
    return one.dtype == other.dtype and bool((one.isnan() & other.isnan())[different].all())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("grid", GRIDS_TRIED, ids=lambda grid: grid.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_quantizing_and_reading_give_the_same_bits(grid, shape):
    for dtype in (torch.float32, torch.bfloat16):
        values = drawn(shape, dtype)
        expected = codes.quantize(values, grid)
        got = cpu.quantize(values, grid)
        assert same(got, expected)
        whole = codes.dequantize(expected, dtype)
        assert same_values(cpu.dequantize(got, dtype), whole)
        index = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]], dtype=torch.int32)
        assert same_values(cpu.dequantize_entries(got, index, dtype), whole[index])
        part = got.rows(shape[0] // 3, shape[0])
        into = torch.empty(part.shape, dtype=dtype)
        assert cpu.dequantize(part, out=into) is into
        assert same_values(into, whole[shape[0] // 3 :])


@pytest.mark.usefixtures("compiled")
def test_every_product_of_a_code_and_a_scale_is_read_as_defined():
    """All positive float16 scales, each with 64 random codes of 12 bits."""
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    weight = codes.empty(Grid("int12", 2047, 32), (len(scales), 64))
    generator = torch.Generator().manual_seed(0)
    codes.store_codes(weight, torch.randint(-2047, 2048, weight.shape, generator=generator))
    weight.scales.copy_(scales[:, None])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(cpu.dequantize(weight, dtype), codes.dequantize(weight, dtype))


@pytest.mark.usefixtures("compiled")
def test_extreme_blocks_are_quantized_as_defined():
    """Scales at both ends of float16 and between its subnormal numbers, and values that no scale reaches."""
    largest = [0.0, 1e-45, 1e-38, 1e-9, 7 * 2.0**-24, 1.01 * 7 * 2.0**-24, 3e-4, 65504.0 * 7, 458529.0, 1e30, torch.inf]
    values = torch.linspace(-1, 1, 32)[None] * torch.tensor(largest)[:, None]
    for grid in GRIDS.values():
        assert same(cpu.quantize(values, grid), codes.quantize(values, grid))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    monkeypatch.setattr(cpu, "threads_for", lambda count: threads)
    values = drawn((70, 960))
    expected = codes.quantize(values, INT8)
    assert same(cpu.quantize(values, INT8), expected)
    assert torch.equal(cpu.dequantize(expected), codes.dequantize(expected))


def test_tensors_that_are_not_contiguous_and_other_dtypes_are_handled():
    values = drawn((40, 64))
    turned = values.t().contiguous().t()
    assert not turned.is_contiguous()
    expected = codes.quantize(values, INT8)
    assert same(cpu.quantize(turned, INT8), expected)
    spread = expected.with_tensors(expected.codes.t().contiguous().t(), None, expected.scales)
    assert torch.equal(cpu.dequantize(spread), codes.dequantize(expected))
    assert cpu.dequantize(expected, torch.float16).dtype == torch.float16
    assert same(cpu.quantize(values.half(), INT8), codes.quantize(values.half(), INT8))


def test_an_index_out_of_range_is_refused():
    weight = codes.quantize(drawn((5, 64)), INT8)
    assert cpu.dequantize_entries(weight, torch.empty(0, dtype=torch.int64)).shape == (0, 64)
    for wrong in (5, -1):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for 5 entries"):
            cpu.dequantize_entries(weight, torch.tensor([0, wrong]))


def test_without_a_compiler_plain_torch_reads(monkeypatch):
    def missing(*_: object, **__: object) -> Path:
        raise cpu.compiling.CompilerMissing("no C++ compiler was found")

    monkeypatch.setattr(cpu.compiling, "build", missing)
    cpu.library.cache_clear()
    values = drawn((7, 96))
    try:
        with pytest.warns(UserWarning, match="no C.. compiler was found.*several times slower"):
            weight = cpu.quantize(values, INT8)
        assert torch.equal(load_codes(weight), load_codes(codes.quantize(values, INT8)))
        assert torch.equal(cpu.dequantize(weight), codes.dequantize(weight))
    finally:
        cpu.library.cache_clear()
