"""Measures time and temporary memory of one optimizer step on a model's real parameter shapes, for many optimizers.

    python benchmarks/optimizer_step.py --model smollm2-135m --json optimizer_step.json
    python benchmarks/optimizer_step.py --model llama-8b        # or a folder with a config.json, or 4096x11008

All optimizers work in turns in one process, on the same weights and random gradients. Each round builds an optimizer,
lets it take its first step unmeasured, measures some more, and drops it. An optimizer whose first step takes longer
than --limit-s is skipped. One that compiles in its first step takes it beforehand in a separate process, which can be
stopped. All run on the GPU if there is one; CUDA_VISIBLE_DEVICES= before the command keeps them on the CPU. The bound
is the time that a plain copy, measured in the same rounds, needs for 5 times the weights' bytes: an exact Adafactor
reads the gradient three times, and reads and writes the weight. "One by one" launches every update on its own, as all
were before small ones shared their launches on a GPU; on a CPU it is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Any]
Build = Callable[[nn.ParameterList], Step]
PASSES = 5
RATE = 1e-5
SLOW_REFERENCE = 100_000_000
COMPILING = ("torchao AdamW8bit",)


def main() -> None:
    arguments = parse()
    from benchmarks.shapes import parameter_shapes

    shapes = [shape for name in arguments.model for shape in parameter_shapes(name)]
    if arguments.probe:
        take_first_step(shapes, arguments)
        return
    from benchmarks.provenance import provenance

    made = provenance()
    rows = [{**row, **made} for row in benchmark(shapes, arguments)]
    show(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m"], help="NAMEs of random:NAME, folders, or RxC")
    parser.add_argument("--optimizers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps per round")
    parser.add_argument(
        "--limit-s", type=float, default=120.0, help="longest first step; slower optimizers are skipped"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# The contenders: each builds an optimizer and returns its step


def ours(
    name: str, stochastic_rounding: bool, kernels: str = "", most_waiting_bytes: int | None = None, grid: str = ""
) -> Build:
    def build(weights: nn.ParameterList) -> Step:
        import sbft.optim

        if kernels == "reference" and weights[0].is_cuda and count(weights) > SLOW_REFERENCE:
            raise RuntimeError("the reference goes block by block: minutes per step on a GPU")
        trained = on_grid(weights, grid) if grid else weights
        optimizer = getattr(sbft.optim, name)(trained.parameters(), lr=RATE, stochastic_rounding=stochastic_rounding)
        optimizer.most_waiting_bytes = most_waiting_bytes

        def step() -> None:
            for weight, given in zip(trained, weights, strict=True):
                weight.grad = given.grad
            optimizer.tokens_per_step = 1024
            before = os.environ.pop("SBFT_KERNELS", None)
            if kernels:
                os.environ["SBFT_KERNELS"] = kernels
            optimizer.step()
            os.environ.pop("SBFT_KERNELS", None)
            if before is not None:
                os.environ["SBFT_KERNELS"] = before

        return step

    return build


def on_grid(weights: nn.ParameterList, grid: str) -> nn.ParameterList:
    """The same values on a grid; vectors stay as they are."""
    from sbft.grid.convert import put_on_grids

    copied = nn.ParameterList(weight.detach() for weight in weights)
    put_on_grids(copied, grid)
    return copied


def torchs(name: str, **settings: Any) -> Build:
    return lambda weights: getattr(torch.optim, name)(weights.parameters(), lr=RATE, **settings).step


def transformers_adafactor(weights: nn.ParameterList) -> Step:
    from transformers.optimization import Adafactor

    return Adafactor(weights.parameters(), lr=RATE, relative_step=False, scale_parameter=True, warmup_init=False).step


def bitsandbytes_adamw8bit(weights: nn.ParameterList) -> Step:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights.parameters(), lr=RATE).step


def torchao_adamw8bit(weights: nn.ParameterList) -> Step:
    from torchao.optim import AdamW8bit

    return AdamW8bit(weights.parameters(), lr=RATE, bf16_stochastic_round=weights[0].dtype == torch.bfloat16).step


def adalomo(weights: nn.ParameterList) -> Step:
    from lomo_optim import AdaLomo

    optimizer = AdaLomo(weights, lr=RATE)
    optimizer.step_num = 1
    return lambda: optimizer.grad_func(None)


def optimi_adam(weights: nn.ParameterList) -> Step:
    from optimi import Adam

    return Adam(weights.parameters(), lr=RATE).step


CONTENDERS: dict[str, Build] = {
    "sbft Adafactor, SR": ours("Adafactor", True),
    "sbft Adafactor, SR, one by one": ours("Adafactor", True, most_waiting_bytes=0),
    "sbft Adafactor": ours("Adafactor", False),
    "sbft Adafactor, SR, reference": ours("Adafactor", True, "reference"),
    "sbft Adafactor, reference": ours("Adafactor", False, "reference"),
    "sbft Adafactor, int12": ours("Adafactor", True, grid="int12"),
    "sbft Adafactor, int8": ours("Adafactor", True, grid="int8"),
    "sbft Adafactor, int4": ours("Adafactor", True, grid="int4"),
    "sbft AdamW, SR": ours("AdamW", True),
    "sbft AdamW, SR, one by one": ours("AdamW", True, most_waiting_bytes=0),
    "sbft SGD, SR": ours("SGD", True),
    "transformers Adafactor": transformers_adafactor,
    "torch Adafactor": torchs("Adafactor"),
    "torch AdamW, fused": torchs("AdamW", fused=True),
    "torch AdamW, foreach": torchs("AdamW", foreach=True),
    "torch SGD": torchs("SGD"),
    "bitsandbytes AdamW8bit": bitsandbytes_adamw8bit,
    "torchao AdamW8bit": torchao_adamw8bit,
    "lomo-optim AdaLomo": adalomo,
    "torch-optimi Adam": optimi_adam,
}


# Measurement


class TooSlow(Exception):
    """A first step that took too long; the message says so."""


def benchmark(shapes: list[tuple[int, ...]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in arguments.optimizers}
    temporary: dict[str, int] = {}
    skipped: dict[str, str] = {}
    bounds: list[float] = []

    def skip(name: str, why: str) -> None:
        skipped[name] = why
        print(f"{name}: {why}", file=sys.stderr)

    for name in arguments.optimizers:
        # This comes before this process allocates memory itself.
        if name in COMPILING and (why := probe(name, arguments)) is not None:
            skip(name, why)
    weights, grads = tensors(shapes, arguments)
    device, dtype = weights[0].device, weights[0].dtype
    for _ in range(arguments.rounds):
        bounds += copy_bounds(count(weights), dtype, device, arguments.steps)
        for name in arguments.optimizers:
            if name in skipped:
                continue
            try:
                measured, taken = measure(CONTENDERS[name], weights, grads, arguments.steps, arguments.limit_s)
            except Exception as error:  # any error of another package is the reason why it cannot run here
                skip(name, reason(error))
                continue
            times[name] += measured
            temporary[name] = min(taken, temporary.get(name, taken))
    common = {
        "backend": device.type, "device": device_name(), "dtype": arguments.dtype, "parameters": count(weights),
        "model": " ".join(arguments.model), "torch": torch.__version__, "copy_bound_ms": statistics.median(bounds),
    }  # fmt: skip
    return [row(name, common, times[name], temporary.get(name), skipped.get(name)) for name in arguments.optimizers]


def tensors(shapes: list[tuple[int, ...]], arguments: argparse.Namespace) -> tuple[nn.ParameterList, list[Tensor]]:
    """Weights and gradients."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    weights = nn.ParameterList(torch.empty(s, dtype=dtype, device=device).normal_(std=0.02) for s in shapes)
    grads = [torch.empty(s, dtype=dtype, device=device).normal_(std=1e-3) for s in shapes]
    return weights, grads


def probe(name: str, arguments: argparse.Namespace) -> str | None:
    """Takes a contender's first step in a separate process; returns why to skip it, or None if it succeeds in time."""
    command = [sys.executable, __file__, "--probe", "--optimizers", name, "--dtype", arguments.dtype]
    command += ["--model", *arguments.model]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # printed when the first step begins
        _, errors = child.communicate(timeout=arguments.limit_s)
    except subprocess.TimeoutExpired:
        return str(too_slow(arguments.limit_s))
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # and the compilers it has started
            child.communicate()
    return (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1] if child.returncode else None


def take_first_step(shapes: list[tuple[int, ...]], arguments: argparse.Namespace) -> None:
    """Takes one step, in the process of a probe."""
    weights, grads = tensors(shapes, arguments)
    begin(weights, grads)
    print("the first step begins", flush=True)
    try:
        CONTENDERS[arguments.optimizers[0]](weights)()
        synchronize(weights[0].device)
    except Exception as error:
        raise SystemExit(reason(error)) from error


def measure(
    build: Build, weights: nn.ParameterList, grads: list[Tensor], steps: int, limit_s: float
) -> tuple[list[float], int]:
    """Milliseconds of each step, and bytes of temporary memory, without the state, of a further step."""
    from sbft.native.memory import PeakMemory

    try:
        step = build(weights)
        milliseconds: list[float] = []
        for _ in range(steps + 1):
            start = begin(weights, grads)
            step()
            synchronize(weights[0].device)
            milliseconds.append(1e3 * (time.perf_counter() - start))
            if milliseconds[0] > 1e3 * limit_s:
                raise too_slow(limit_s)
        begin(weights, grads)
        free_memory()
        with PeakMemory() as memory:
            step()
        return milliseconds[1:], memory.peak_bytes - memory.baseline_bytes
    finally:
        for weight in weights:
            weight.grad = None
            weight._backward_hooks = None  # AdaLomo leaves one
        step = None
        free_memory()


def too_slow(limit_s: float) -> TooSlow:
    return TooSlow(f"its first step took longer than {limit_s:g} s")


def free_memory() -> None:
    """Returns memory that torch and malloc keep for later, whose reuse would not show."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def begin(weights: nn.ParameterList, grads: list[Tensor]) -> float:
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    synchronize(grads[0].device)
    return time.perf_counter()


def copy_bounds(parameters: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds that a copy, which reads and writes, takes to move `PASSES` times the weights' bytes."""
    size = min(max(parameters, 1 << 16), 1 << 30)
    source, target = torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)
    milliseconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        milliseconds.append(1e3 * (time.perf_counter() - start) * PASSES / 2 * parameters / size)
    return milliseconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count(weights: nn.ParameterList) -> int:
    return sum(weight.numel() for weight in weights)


def device_name() -> str:
    from sbft.native.memory import device_name

    return device_name()


def reason(error: Exception) -> str:
    if isinstance(error, TooSlow):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# The table


def row(
    name: str, common: dict[str, Any], times: list[float], temporary: int | None, skipped: str | None
) -> dict[str, Any]:
    line: dict[str, Any] = {"optimizer": name, **common, "skipped": skipped}
    if "reference" in name:
        line["backend"] = "reference"
    if skipped is not None:
        return {**line, "median_ms": None, "min_ms": None, "max_ms": None, "ratio": None, "temporary_bytes": None}
    median = statistics.median(times)
    return {
        **line, "median_ms": median, "min_ms": min(times), "max_ms": max(times),
        "ratio": median / common["copy_bound_ms"], "temporary_bytes": temporary,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"{first['model']}: {first['parameters']:,} parameters, {first['dtype']}, {first['device']}")
    print(f"copy bound ({PASSES} x the weights' bytes): {first['copy_bound_ms']:.2f} ms\n")
    print(f"{'':32} {'median ms':>10} {'min':>9} {'max':>9} {'/ bound':>8} {'temporary MiB':>14}")
    for line in rows:
        if line["skipped"] is not None:
            print(f"{line['optimizer']:32} {line['skipped']}")
            continue
        figures = "".join(
            f" {line[key]:>{width}.2f}" for key, width in (("median_ms", 10), ("min_ms", 9), ("max_ms", 9))
        )
        print(f"{line['optimizer']:32}{figures} {line['ratio']:>8.2f} {line['temporary_bytes'] / 2**20:>14.1f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
