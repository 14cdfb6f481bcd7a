"""The matrix products that oneDNN compiles on a CPU: how many of them a process keeps, and what each of them takes.

Torch multiplies bfloat16 matrices on a CPU with oneDNN, which compiles each product for its shapes, including the number of
rows. So every further length of examples adds some fifteen products, and each takes a millisecond or a few to compile. Two
caches keep what was compiled: torch's for descriptions, and oneDNN's for code. Each holds 1,024 entries before it evicts any.
That is 0.8 GiB on a processor with AMX, more than training a model of 135 million weights takes in all at batch size 1.

What a product takes depends on the instructions that it is compiled for: 0.8 MiB with AMX, 0.55 to 0.6 with AVX-512's
bfloat16, 0.1 with AVX-512 without bfloat16, nothing with AVX2 (there torch multiplies without oneDNN). So it is measured, once
on each machine, by `python -m sbft.native.onednn_products`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from sbft.files import cache_dir, replacing
from sbft.native.compiling import processor
from sbft.native.memory import resident_bytes
from sbft.native.memory_pool import pool_available, pool_bytes, use_pool

MOST_KEPT = 128
"""Entries that each cache keeps here: the products of about eight lengths. benchmarks/README.md has the costs."""
MOST_BYTES_EACH = round(1.07 * (1 << 20))
"""The largest resident size of a product seen on any processor: with AMX, over 18 products with 49 row counts each."""
_SHAPES = ((256, 256), (512, 1536), (576, 192))
"""Shapes of the weights whose products are measured. They differ by a fifth; larger weights stay within that range."""
_ROW_COUNTS = range(16, 144, 16)
_DESCRIPTION_BYTES = 128 << 10
"""Less than the size of a product's description, 258 KiB."""
_M_MMAP_THRESHOLD = -3  # <malloc.h>
# Of ideep, torch's layer over oneDNN, and of oneDNN itself. Each reads its own once, at the first product.
_SWITCHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
# Limits the instructions that oneDNN uses; the variable has two names.
_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_MEASURE_LIMIT_S = 120.0  # measuring takes two or three seconds


def keep_few_products() -> None:
    """Let this process keep `MOST_KEPT` compiled products, unless the environment sets another number.

    Call it before the first product in bfloat16, since it has no effect later, and after `use_pool`. If large tensors come
    from a pool, malloc is also told to map blocks of a description's size separately, so the memory of an evicted
    description is returned. Between other blocks, evicted descriptions left gaps of a quarter of their size. Without a pool,
    every tensor of that size would be mapped anew, too, and its pages cleared: a forward of 256 tokens through SmolLM2-135M
    took 16 to 36 % longer.
    """
    for name in _SWITCHES:
        os.environ.setdefault(name, str(MOST_KEPT))
    if sys.platform == "linux" and pool_bytes() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _DESCRIPTION_BYTES)


def products_bytes(products: int) -> int:
    """Bytes that this many products of different shapes take on this machine's CPU, or those of them that are kept.

    How many are kept is the larger of the two caches' sizes, which the environment may set.
    """
    if products == 0 or not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    sizes = [os.environ.get(name, "") for name in _SWITCHES]
    kept = max(int(size) if size.isdecimal() else MOST_KEPT for size in sizes)
    return min(products, kept) * bytes_each()


@functools.cache
def bytes_each() -> int:
    """Mean resident size of a compiled product on this machine's CPU, in bytes.

    Another process measures it: in this one, freed memory may have room for products, or a cache may be full. That is done
    once per processor, torch version and environment variables of oneDNN, and the number is kept in the user's cache. If it
    cannot be measured, there is a warning, and the result is `MOST_BYTES_EACH`.
    """
    facts = [
        processor(),
        torch.__version__,
        str(pool_available()),
        *(os.environ.get(name, "") for name in _INSTRUCTIONS),
    ]
    name = hashlib.sha256("\0".join([Path(__file__).read_text(encoding="utf-8"), *facts]).encode()).hexdigest()[:16]
    file = cache_dir() / "compiled_products" / name
    if file.is_file() and (text := file.read_text()).isdecimal():
        return int(text)
    try:
        measured = _measured_elsewhere()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the size of a compiled matrix product could not be measured ({error}): {MOST_BYTES_EACH >> 10} KiB are "
            "assumed, so the predicted peak may be too high",
            stacklevel=2,
        )
        return MOST_BYTES_EACH
    with contextlib.suppress(OSError):  # a cache that cannot be written to: the next process measures it again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as part:
            part.write_text(str(measured))
    return measured


def _measured_elsewhere() -> int:
    """Runs `measure` in a process of its own that keeps all products."""
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "sbft.native.onednn_products"],
        env={
            **os.environ,
            **dict.fromkeys(_SWITCHES, "1024"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=_MEASURE_LIMIT_S,
    )
    return int(done.stdout)


def measure() -> int:
    """By how many bytes this process grows per compiled product, in the mean of some shapes.

    Call it in a process that has not compiled any product yet, and that keeps all of them.
    """
    use_pool()
    keep_few_products()
    for inner, outer in _SHAPES:  # the first product of a shape takes more
        _multiply(8, inner, outer)
    before = resident_bytes()
    products = sum(_multiply(rows, inner, outer) for rows in _ROW_COUNTS for inner, outer in _SHAPES)
    return max(resident_bytes() - before, 0) // products


def _multiply(rows: int, inner: int, outer: int) -> int:
    """Computes the products of a linear layer in forward and backward; returns how many they are."""
    left, weight = (torch.ones(size, inner, dtype=torch.bfloat16) for size in (rows, outer))
    out = left @ weight.t()
    out @ weight, out.t() @ left
    return 3


if __name__ == "__main__":
    print(measure())
