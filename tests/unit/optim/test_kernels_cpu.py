"""The compiled CPU kernels against the reference, their memory, their build, and a machine without a compiler."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sbft.optim import Adafactor
from sbft.optim.kernels import backend_for, cpu, reference
from sbft.rounding import noise_from_key, noise_key
from tests.measure import BACKENDS
from tests.measure import SHAPES as MEASURED_SHAPES
from tests.unit.optim.updates import ADAFACTOR, ADAMW, SGD

SHAPES = [
    (1, 1), (1,), (7,), (33,), (1000,), (70_000,), (5, 40_000), (128, 128), (130, 129), (513, 577), (200, 1536),
    (1536, 200), (3, 128, 200), (2, 3, 130, 131), (4, 3, 5, 7), (4096, 130),
]  # fmt: skip
KEY = noise_key(1, 2, 3)


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """A random gradient: contiguous, transposed in its last two dimensions, or every other column of a wider one."""
    generator = torch.Generator().manual_seed(sum(shape))
    if layout == "transposed" and len(shape) > 1:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return torch.randn(swapped, generator=generator).to(dtype).transpose(-1, -2)
    if layout == "every other column":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
    return torch.randn(shape, generator=generator).to(dtype)


def update(backend, rule: str, weight: Tensor, grad: Tensor, key) -> dict[str, Tensor]:
    """Runs one update from a state that is not zero; returns the new weight and state."""

    def filled(shape) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.1

    w = weight.clone()
    state = {"mass": torch.tensor(0.7), "second_mass": torch.tensor(0.4)}
    if rule == "adafactor" and w.ndim > 1 and min(w.shape[-2:]) >= 128:
        state |= {"row": filled(w.shape[:-1]), "column": filled(w.shape[:-2] + w.shape[-1:])}
        args = (state["row"], state["column"], state["mass"], None)
        _, total = backend.adafactor_factored(w, grad, *args, **ADAFACTOR, key=key)
        state["total"] = torch.as_tensor(float(total))
    elif rule == "adafactor":
        state["v"] = filled(w.shape)
        _, total = backend.adafactor_full(w, grad, state["v"], state["mass"], None, **ADAFACTOR, key=key)
        state["total"] = torch.as_tensor(float(total))
    elif rule.startswith("adamw"):
        state |= {"m": filled(w.shape), "v": filled(w.shape)}
        first = state["m"] if rule == "adamw" else None
        backend.adamw(w, grad, first, state["v"], state["mass"], state["second_mass"], **ADAMW, key=key)
    else:
        state["m"] = filled(w.shape)
        momentum, mass = (state["m"], state["mass"]) if rule == "sgd-momentum" else (None, None)
        backend.sgd(w, grad, momentum, mass, **SGD, key=key)
    return {"weight": w, **state}


def ordered(weight: Tensor) -> Tensor:
    """bfloat16 values as integers whose difference is their distance in bfloat16 steps."""
    bits = weight.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other column"])
@pytest.mark.parametrize("rule", ["adafactor", "adamw", "adamw-no-momentum", "sgd", "sgd-momentum"])
def test_compiled_and_reference_updates_agree(shape, layout, rule):
    for dtype, key in [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, KEY)]:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grad = strided(shape, layout, dtype)
        expected, got = (update(backend, rule, weight, grad, key) for backend in (reference, cpu))
        for name in expected.keys() - {"weight"}:  # sums of up to 280,000 squares in a different order
            torch.testing.assert_close(got[name], expected[name], rtol=2e-5, atol=0)
        if dtype == torch.float32:
            torch.testing.assert_close(got["weight"], expected["weight"], rtol=2e-6, atol=2e-6)
        elif rule == "adafactor":
            assert (ordered(got["weight"]) - ordered(expected["weight"])).abs().max() <= 1
            assert (got["weight"] != expected["weight"]).float().mean() < 1e-3
        else:  # no sums: the same bits
            assert torch.equal(got["weight"], expected["weight"])


@pytest.mark.parametrize("shape", [(130, 129), (513, 577), (3, 128, 200)], ids=str)
@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_given_the_same_sums_adafactors_weights_are_equal(shape, key):
    """With squares of one, every sum is a small whole number, exact in any order."""
    signs = torch.where(torch.randn(shape, generator=torch.Generator().manual_seed(2)) > 0, 1.0, -1.0)
    for dtype in (torch.float32, torch.bfloat16):
        weights = []
        for backend in (reference, cpu):
            weight, grad = signs.to(dtype) * 0.5, (-signs).to(dtype)
            row, column = torch.zeros(shape[:-1]), torch.zeros(shape[:-2] + shape[-1:])
            mass = torch.zeros(())
            backend.adafactor_factored(weight, grad, row, column, mass, None, **{**ADAFACTOR, "lr": 0.0123}, key=key)
            weights.append(weight)
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], signs.to(dtype) * 0.5)


@pytest.mark.parametrize("offset", [0, 5, 2**31 - 3, 2**33 + 7, 2**37 + 1])
def test_noise_is_bit_identical(offset):
    made = torch.empty(1000, dtype=torch.int32)
    cpu.library().sbft_noise(*KEY, offset, 1000, made.data_ptr())
    assert torch.equal(made, noise_from_key(KEY, 1000, offset))


@pytest.mark.parametrize("shape", [(513, 577), (70_000,), (3, 128, 200)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, monkeypatch):
    monkeypatch.setattr("sbft.grid.cpu.ELEMENTS_PER_THREAD", 1)
    weight, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(update(cpu, "adafactor", weight, grad, KEY))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("shape", [(513, 577), (70_000,), (3, 130, 201)], ids=str)
def test_the_carried_sum_of_squares_is_the_one_that_would_be_taken_anew(shape):
    grad = torch.randn(shape).bfloat16()
    kernel = cpu.adafactor_factored if len(shape) > 1 else cpu.adafactor_full
    state = [torch.zeros(shape[:-1]), torch.zeros(shape[:-2] + shape[-1:])] if len(shape) > 1 else [torch.zeros(shape)]

    def run(carry: bool) -> Tensor:
        weight, mass, total = torch.ones(shape).bfloat16(), torch.zeros(()), None
        own = [s.clone() for s in state]
        for _ in range(4):
            _, total = kernel(weight, grad, *own, mass, total if carry else None, **ADAFACTOR, key=KEY)
        return weight

    assert torch.equal(run(carry=True), run(carry=False))


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.measure"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MEASURED_SHAPES, ids=str)
def test_an_update_allocates_no_full_size_temporary(backend, shape, measured):
    weight_bytes = 2 * math.prod(shape)
    rows_and_columns = 4 * 4 * sum(shape)
    limit = max(1 << 20, weight_bytes // 100 + rows_and_columns)
    used = measured[backend][str(shape)]
    assert used <= limit, f"{used:,} bytes for a tensor of {weight_bytes:,}"


def test_the_device_and_the_environment_choose_the_backend(monkeypatch):
    assert backend_for(torch.device("cpu")) is cpu
    assert backend_for(torch.device("mps")) is reference
    monkeypatch.setenv("SBFT_KERNELS", "reference")
    assert backend_for(torch.device("cpu")) is reference
    monkeypatch.setenv("SBFT_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        backend_for(torch.device("cpu"))


def test_weights_that_are_not_contiguous_are_updated_too():
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(150, 140))
    turned = nn.Parameter(plain.detach().t().contiguous().t())
    assert not turned.is_contiguous()
    for weight in (plain, turned):
        optimizer = Adafactor([weight], lr=1e-2)
        optimizer.tokens_per_step = 1
        weight.grad = torch.ones_like(plain) * torch.arange(140)
        optimizer.step()
    torch.testing.assert_close(turned, plain, rtol=2e-6, atol=2e-6)


SCRIPT = """
import time, warnings, torch
from sbft.optim.kernels import cpu
start = time.perf_counter()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    library = cpu.library()
    cpu.library()
print("seconds", time.perf_counter() - start)
print("compiled", library is not None)
for w in caught: print("warned", w.message)
weight = torch.nn.Parameter(torch.ones(130, 140).bfloat16())
from sbft.optim import Adafactor
optimizer = Adafactor([weight], lr=0.1)
optimizer.tokens_per_step = 1
weight.grad = torch.ones_like(weight)
optimizer.step()
print("moved", bool((weight != 1).any()))
"""


def start_process(cache: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "SBFT_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(line.split(" ", 1) for line in out.splitlines())


@pytest.mark.long
def test_two_processes_may_build_at_once_and_a_third_builds_nothing(tmp_path):
    both = [start_process(tmp_path) for _ in range(2)]
    for process in both:
        assert finish(process)["compiled"] == "True"
    (library,) = (tmp_path / "kernels").iterdir()  # one file, and no temporary file left
    written = library.stat().st_mtime_ns
    start = time.time()
    third = finish(start_process(tmp_path))
    assert third["compiled"] == "True"
    assert library.stat().st_mtime_ns == written < start * 1e9
    assert float(third["seconds"]) < 0.5


def test_without_a_compiler_the_reference_runs_and_one_warning_says_so(tmp_path):
    result = finish(start_process(tmp_path, PATH=str(tmp_path), CXX=""))
    assert result["compiled"] == "False"
    assert "no C++ compiler was found" in result["warned"]
    assert "ten times slower" in result["warned"]
    assert result["moved"] == "True"


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho unsupported flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = finish(start_process(tmp_path / "cache", CXX=str(compiler)))
    assert result["compiled"] == "False"
    assert "unsupported flag" in result["warned"]
    assert not list((tmp_path / "cache" / "kernels").iterdir())
