"""The Triton kernels compiled for a Hopper GPU on a machine that has none; `test_kernels_cuda` runs this in its own process."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from sbft.optim.kernels import cuda
from sbft.rounding import noise_key

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KEY = noise_key(1, 2, 3)
BF16 = torch.bfloat16


class Hopper:
    """What compilation asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The kernels that the functions of `cuda` would launch, by name."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    driver.set_active(Hopper())
    kernels: dict[str, Any] = {}
    run = jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        name = self.__name__
        assert kernels.setdefault(name, kernel) is kernel, f"{name} was compiled twice for one parameter"

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    return kernels


def spills(kernel: Any, tmp_path: Path) -> bool:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"STACK:(\d+)", usage)[1] != "0"  # type: ignore[index]


def adafactor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, grad = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    state = [torch.zeros(s) for s in (shape[:-1], shape[:-2] + shape[-1:], ())]
    function = cuda.adafactor_factored
    if len(shape) == 1 or min(shape[-2:]) < 128:
        function, state = cuda.adafactor_full, [torch.zeros(shape), torch.zeros(())]  # type: ignore[assignment]
    function(
        weight, grad, *state, None, average_weight=0.1, lr=0.1, relative_step=True, clip_threshold=1.0, eps=1e-30,
        weight_decay=0.0, key=KEY,
    )  # fmt: skip


def others(numel: int, dtype: torch.dtype) -> None:
    weight, grad, mass = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype), torch.zeros(())
    moments: list[Tensor] = [torch.zeros(numel), torch.zeros(numel)]
    step = {"lr": 0.1, "weight_decay": 0.0, "key": KEY}
    cuda.adamw(weight, grad, *moments, mass, mass, first_weight=0.1, second_weight=0.1, eps=1e-8, **step)
    cuda.sgd(weight, grad, None, None, momentum_weight=1.0, **step)


CASES = {
    "matrix": (lambda: adafactor((1024, 2048), BF16), 4),
    "vector": (lambda: adafactor((4096,), BF16), 1),
    "long and narrow": (lambda: adafactor((8192, 16), BF16), 3),
    "AdamW and SGD": (lambda: others(1 << 20, BF16), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_hopper(case: str, compiled: dict[str, Any], tmp_path: Path) -> None:
    update, launches = CASES[case]
    update()
    assert len(compiled) == launches
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert "fma.rn" not in ptx, f"{name} fuses multiplications into additions, which the reference does not"
        assert ".ftz" not in ptx and "approx" not in ptx and "div.full" not in ptx, f"{name} rounds or flushes"
        assert not spills(kernel, tmp_path), f"{name} keeps registers in memory"
        if "grad" in kernel.src.fn.arg_names:
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), f"{name} does not load 16 bytes at once"
        if "atom." in ptx:  # a program arrives after all its threads have stored, and sees what others stored before
            arrival = r"bar\.sync[^\n]*\n(?:(?!bar\.sync|st\.global)[^\n]*\n)*[^\n]*atom\.global\.gpu\.acq_rel"
            assert re.search(arrival, ptx), f"{name} arrives without a barrier"
