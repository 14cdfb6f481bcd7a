"""The Triton kernels compiled for Hopper on a machine without such a GPU; `test_kernels_cuda` runs this in a process."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from sbft.grid import cuda as grid_cuda
from sbft.grid.codes import quantize
from sbft.grid.formats import GRIDS, INT4, INT8, INT12, Grid
from sbft.optim.kernels import cuda
from sbft.optim.kernels.cuda_waiting import WaitingUpdates
from sbft.rounding import noise_key

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KEY = noise_key(1, 2, 3)
BF16 = torch.bfloat16
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Launched(NamedTuple):
    """The arguments that a launch passed to the driver."""

    program: str
    grid: tuple[int, ...]
    arguments: list[Any]
    kinds: list[str]
    named: dict[int, str]

    def shown(self) -> tuple[Any, ...]:
        """The launch with names in place of addresses: the temporary memory of an update has a different address each time."""
        shown = []
        for one, kind in zip(self.arguments, self.kinds, strict=True):
            if kind.startswith("*"):
                address = one.data_ptr() if isinstance(one, Tensor) else one
                shown.append(self.named.get(address, "scratch"))
            elif kind != "constexpr":
                shown.append(one)
        return self.program, self.grid, shown


class Hopper:
    """The part of a driver that compilation and launching use."""

    def __init__(self, named: dict[int, str] | None = None) -> None:
        self.launched: list[Launched] = []
        self.utils = self
        self._named = named or {}

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        kinds = list(source.signature.values())

        def launch(*passed: Any) -> None:
            # After the grid: the stream, the function, metadata of both, and two hooks.
            self.launched.append(Launched(source.fn.__name__, passed[:3], list(passed[9:]), kinds, self._named))

        return launch

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


HOSTS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "key": KEY}
WORDS, NUMBER = torch.zeros(2, dtype=torch.int32), torch.zeros((), dtype=torch.float64)
DEVICES: dict[str, Any] = {**HOSTS, "lr": NUMBER, "key": (WORDS[0], WORDS[1])}
"""Numbers of a step: as Python numbers, and in tensors, where a captured launch finds them."""


def adafactor(
    shape: tuple[int, ...],
    transposed: bool = False,
    step: dict[str, Any] = HOSTS,
    grid: Grid | None = None,
    backend: Any = cuda,
) -> Callable[[], object]:
    zeros = torch.zeros(shape, dtype=BF16)
    weight: Any = zeros if grid is None else quantize(zeros, grid)
    grad = torch.zeros(shape[::-1], dtype=BF16).T if transposed else torch.zeros_like(zeros)
    state = [torch.zeros(s) for s in (shape[:-1], shape[:-2] + shape[-1:], ())]
    function = backend.adafactor_factored
    if len(shape) == 1 or min(shape[-2:]) < 128:
        function, state = backend.adafactor_full, [torch.zeros(shape), torch.zeros(())]  # type: ignore[assignment]
    settings = {"average_weight": NUMBER if step is DEVICES else 0.1, "clip_threshold": 1.0, "eps": 1e-30, **step}
    return lambda: function(weight, grad, *state, None, relative_step=True, **settings)


def others(
    numel: int, step: dict[str, Any] = HOSTS, grid: Grid | None = None, backend: Any = cuda
) -> Callable[[], object]:
    shape = (numel,) if grid is None else (numel // 1024, 1024)
    grad, mass = torch.zeros(shape, dtype=BF16), torch.zeros(())
    weight: Any = torch.zeros_like(grad) if grid is None else quantize(grad, grid)
    moments: list[Tensor] = [torch.zeros(shape), torch.zeros(shape)]
    of_average = NUMBER if step is DEVICES else 0.1
    weights = {"first_weight": of_average, "second_weight": of_average, "eps": 1e-8}
    return lambda: (
        backend.adamw(weight, grad, *moments, mass, mass, **weights, **step),
        backend.sgd(weight, grad, moments[0], mass, momentum_weight=of_average, **step),
    )


def values(grid: Grid) -> Callable[[], object]:
    weight = quantize(torch.zeros((1024, 2048), dtype=BF16), grid)
    return lambda: grid_cuda.dequantize(weight)


def together(make: Callable[..., Callable[[], object]], sizes: list[Any], **settings: Any) -> Callable[[], object]:
    """Updates of several weights that share launches."""
    waiting = WaitingUpdates(torch.device("cpu"), 1 << 30)
    updates = [make(size, backend=waiting, **settings) for size in sizes]

    def update() -> None:
        for one in updates:
            one()
        waiting.launch()

    return update


CASES = {
    "matrix": (lambda: adafactor((1024, 2048)), 4),
    "vector": (lambda: adafactor((4096,)), 1),
    "long and narrow": (lambda: adafactor((8192, 16)), 3),
    "AdamW and SGD": (lambda: others(1 << 20), 3),
}
CAPTURED = {
    "captured matrix": (lambda: adafactor((1024, 2048), step=DEVICES), 4),
    "captured vector": (lambda: adafactor((4096,), step=DEVICES), 1),
    "captured AdamW and SGD": (lambda: others(1 << 20, step=DEVICES), 3),
}
ON_GRIDS = {
    **{f"matrix on {name}": (functools.partial(adafactor, (1024, 2048), grid=grid), 4) for name, grid in GRIDS.items()},
    "long and narrow on int8": (functools.partial(adafactor, (8192, 32), grid=INT8), 3),
    "AdamW and SGD on int4": (functools.partial(others, 1 << 20, grid=INT4), 3),
    **{f"values of {name}": (functools.partial(values, grid), 1) for name, grid in GRIDS.items()},
    "captured matrix on int12": (functools.partial(adafactor, (1024, 2048), step=DEVICES, grid=INT12), 4),
}


MATRICES = [(576, 576), (192, 576), (2, 256, 512)]
TOGETHER = {
    "matrices together": (lambda: together(adafactor, MATRICES), 4),
    "matrices of several tiles together": (lambda: together(adafactor, [(4096, 4096), (2048, 8192)]), 4),
    "vectors together": (lambda: together(adafactor, [(576,), (4096,)]), 1),
    "long and narrow together": (lambda: together(adafactor, [(8192, 16), (4096, 16)]), 3),
    "AdamW and SGD together": (lambda: together(others, [1 << 20, 1 << 18]), 3),
    "matrices on int8 together": (lambda: together(adafactor, [(512, 1024), (1024, 512)], grid=INT8), 4),
    "matrices on int4 together": (lambda: together(adafactor, [(512, 1024), (1024, 512)], grid=INT4), 4),
    "AdamW and SGD on int12 together": (lambda: together(others, [1 << 20, 1 << 18], grid=INT12), 3),
}
ALL = {**CASES, **CAPTURED, **ON_GRIDS, **TOGETHER}


@pytest.mark.parametrize("case", ALL)
def test_kernels_compile_for_hopper(case: str, compiled: dict[str, Any], tmp_path: Path) -> None:
    make, launches = ALL[case]
    make()()
    assert len(compiled) == launches
    for name, kernel in compiled.items():
        ptx = kernel.asm["ptx"]
        assert "fma.rn" not in ptx, f"{name} fuses multiplications into additions, which the reference does not"
        if TRITON < (3, 6):  # its division and root flush subnormal numbers to zero
            ptx = ptx.replace(".rn.ftz", ".rn")
        assert ".ftz" not in ptx and "approx" not in ptx and "div.full" not in ptx, f"{name} rounds or flushes"
        assert not spills(kernel, tmp_path), f"{name} keeps registers in memory"
        if "grad" in kernel.src.fn.arg_names or ("table" in kernel.src.fn.arg_names and name != "factors_together"):
            assert re.search(r"ld\.global\S*\.v4\.b32", ptx), f"{name} does not load 16 bytes at once"
        if "atom." in ptx:  # a program arrives once all its threads have stored, and sees what others have stored
            arrival = r"bar\.sync[^\n]*\n(?:(?!bar\.sync|st\.global)[^\n]*\n)*[^\n]*atom\.global\.gpu\.acq_rel"
            assert re.search(arrival, ptx), f"{name} arrives without a barrier"


ALONE_AND_TOGETHER = [
    (functools.partial(adafactor, (576, 576)), functools.partial(together, adafactor, [(576, 576), (192, 576)])),
    (functools.partial(adafactor, (4096, 4096)), functools.partial(together, adafactor, [(4096, 4096)])),
    (
        functools.partial(adafactor, (512, 1024), grid=INT8),
        functools.partial(together, adafactor, [(512, 1024)], grid=INT8),
    ),
    (functools.partial(adafactor, (576,)), functools.partial(together, adafactor, [(576,), (4096,)])),
    (functools.partial(adafactor, (8192, 16)), functools.partial(together, adafactor, [(8192, 16)])),
    (functools.partial(others, 1 << 20), functools.partial(together, others, [1 << 20, 1 << 18])),
]


@pytest.mark.parametrize("pair", ALONE_AND_TOGETHER)
def test_a_launch_of_many_adds_up_in_the_order_of_a_launch_of_one(pair: Any, compiled: dict[str, Any]) -> None:
    """Tiles are laid out over threads in the same way, so every sum has the same order."""
    layouts = []
    for make in pair:
        compiled.clear()
        make()()
        layouts.append([set(re.findall(r"#ttg\.\w+<[^>]*>", kernel.asm["ttgir"])) for kernel in compiled.values()])
    assert layouts[0] == layouts[1] and all(layouts[0])


UPDATES = {name: make for name, (make, _) in {**CASES, **TOGETHER}.items()}
UPDATES["a gradient that is transposed"] = lambda: adafactor((256, 384), transposed=True)


@pytest.mark.parametrize("case", UPDATES)
def test_launches_that_repeat_pass_what_triton_passed(case: str) -> None:
    """The first update is launched by Triton, the second directly."""
    update = UPDATES[case]()
    given = inspect.getclosurevars(update).nonlocals
    tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
    for name, several in given.items():
        several = several if isinstance(several, list) else []
        tensors |= {f"{name} {i}": one for i, one in enumerate(several) if isinstance(one, Tensor)}
    hopper = Hopper({one.data_ptr(): name for name, one in tensors.items()})
    driver.set_active(hopper)
    update()
    first, hopper.launched = hopper.launched, []
    update()
    assert first and len(first) == len(hopper.launched)
    assert any(isinstance(one, Tensor) for one in first[0].arguments)
    assert not any(isinstance(one, Tensor) for launch in hopper.launched for one in launch.arguments)
    assert [launch.shown() for launch in first] == [launch.shown() for launch in hopper.launched]
