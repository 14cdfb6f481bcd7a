"""The matrix products that oneDNN compiles on a CPU, how many of them a process keeps, and what one of them takes.

Torch multiplies bfloat16 matrices on a CPU by oneDNN, which compiles each product for its shapes, the number of rows among
them: every further length of examples takes some fifteen products more, of a millisecond or a few each. Two caches keep
what was compiled, torch's for descriptions and oneDNN's for code, and each holds 1,024 before it forgets any: 0.8 GiB on a
processor with AMX, more than all that a model of 135 million weights takes in training at batch size 1.

What one takes depends on the instructions that it is compiled for: 0.8 MiB with AMX, 0.55 to 0.6 with AVX-512's bfloat16,
0.1 where AVX-512 has none, nothing with AVX2 (there torch multiplies by itself). So it is measured, once on each machine, by
`python -m sbft.native.onednn_products`.
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
"""Of each cache, here: the products of eight lengths or so. What it saves and costs: benchmarks/README.md."""
MOST_BYTES_EACH = round(1.07 * (1 << 20))
"""The largest that was seen on any processor, resident: of 18 products with 49 row counts each, with AMX."""
_SHAPES = ((256, 256), (512, 1536), (576, 192))
"""Of the weights whose products are measured: they differ by a fifth, and those of larger weights are within that."""
_ROW_COUNTS = range(16, 144, 16)
_DESCRIPTION_BYTES = 128 << 10
"""Less than what the description of a product takes, 258 KiB."""
_M_MMAP_THRESHOLD = -3  # <malloc.h>
# Of ideep, the layer of torch's over oneDNN, and of oneDNN itself; each reads its own once, at the first product.
_SWITCHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
# By which oneDNN may be told to do without some instructions of the processor; it has two names.
_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_MEASURE_LIMIT_S = 120.0  # it takes two or three


def keep_few_products() -> None:
    """Let this process keep `MOST_KEPT` compiled products, unless the environment says another number.

    To be called before the first product in bfloat16, later it does nothing, and after `use_pool`: where large tensors come
    from a pool, malloc from then on maps what is as large as a description by itself, so that a forgotten one's memory goes
    back; among others it left gaps of a quarter of their size. Without a pool every tensor of that size would be mapped anew
    too, and its pages cleared: a forward of 256 tokens through SmolLM2-135M took 16 to 36 % longer.
    """
    for name in _SWITCHES:
        os.environ.setdefault(name, str(MOST_KEPT))
    if sys.platform == "linux" and pool_bytes() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _DESCRIPTION_BYTES)


def products_bytes(products: int) -> int:
    """What so many products of different shapes take on this machine's CPU, as many of them as are kept; bytes.

    The larger cache of the two decides, as the environment says it.
    """
    if products == 0 or not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    given = [os.environ.get(name, "") for name in _SWITCHES]
    kept = max(int(one) if one.isdecimal() else MOST_KEPT for one in given)
    return min(products, kept) * bytes_each()


@functools.cache
def bytes_each() -> int:
    """What a compiled product takes in the mean on this machine's CPU, resident.

    Another process measures it: in this one there may be room among freed memory, or a cache that is full already. That is
    done once for a processor, a torch and what the environment says to oneDNN; the number is kept in the user's cache.
    Where it cannot be measured, there is a warning, and it is `MOST_BYTES_EACH`.
    """
    facts = [processor(), torch.__version__, str(pool_available()), *(os.environ.get(name, "") for name in _INSTRUCTIONS)]
    name = hashlib.sha256("\0".join([Path(__file__).read_text(encoding="utf-8"), *facts]).encode()).hexdigest()[:16]
    file = cache_dir() / "compiled_products" / name
    if file.is_file() and (known := file.read_text()).isdecimal():
        return int(known)
    try:
        measured = _measured_elsewhere()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"what a compiled matrix product takes could not be measured ({error}): {MOST_BYTES_EACH >> 10} KiB are "
            "assumed, so that the predicted peak may be too high",
            stacklevel=2,
        )
        return MOST_BYTES_EACH
    with contextlib.suppress(OSError):  # a cache that cannot be written to: the next process measures it again
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as part:
            part.write_text(str(measured))
    return measured


def _measured_elsewhere() -> int:
    """As `measure`, in a process of its own that keeps all products."""
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
    """By what this process rises with a compiled product, in the mean of some shapes; bytes.

    To be called in a process that has compiled none yet, and that keeps all of these.
    """
    use_pool()
    keep_few_products()
    for inner, outer in _SHAPES:  # what the first product of a kind takes besides
        _multiply(8, inner, outer)
    before = resident_bytes()
    products = sum(_multiply(rows, inner, outer) for rows in _ROW_COUNTS for inner, outer in _SHAPES)
    return max(resident_bytes() - before, 0) // products


def _multiply(rows: int, inner: int, outer: int) -> int:
    """The products of a linear layer in forward and backward; how many."""
    left, weight = (torch.ones(size, inner, dtype=torch.bfloat16) for size in (rows, outer))
    out = left @ weight.t()
    out @ weight, out.t() @ left
    return 3


if __name__ == "__main__":
    print(measure())
