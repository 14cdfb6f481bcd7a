"""Memory for large tensors on a CPU that is used again, and never more of it than was in use at once.

Torch takes a CPU's tensors from the C library. Whatever is freed between two that stay is a gap there, which counts as held;
and what the C library gives back to the kernel, the kernel clears again, a page at a time. Of 56 runs
measured, gaps were a fifth in the median of what training takes above the model, and two thirds in the worst
(benchmarks/README.md).

The pool (memory_pool.cpp, compiled on first use) maps each tensor of 64 KiB or more by itself. What is freed is kept for the
next of that size, in which its pages need not be cleared; before anything new is mapped, as much is given back as would else
raise what is held above the most that was ever in use. So the peak is that of the tensors themselves, to within a page each.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from sbft.native.compiling import CompilerMissing, build

SMALLEST_BYTES = 64 << 10
"""Smaller tensors are left to the C library."""
PAGE_BYTES = mmap.PAGESIZE
SWITCH = "SBFT_MEMORY_POOL"
_SOURCE = Path(__file__).with_suffix(".cpp")
_used = False


class PoolBytes(NamedTuple):
    """What a pool holds."""

    in_use: int
    kept: int
    """Freed, and not given back."""
    peak: int
    """The most in use since the pool was last trimmed."""


def use_pool() -> bool:
    """Take all further large tensors of this process on a CPU from a pool; from then on it cannot be undone.

    Tensors that exist already are left as they are. To go on without it, set `SBFT_MEMORY_POOL=0` in the environment.

    Returns:
        Whether there is one now: on Linux, where a C++ compiler is.
    """
    global _used
    if not _used and pool_available():
        library = _library()
        assert library is not None
        library.sbft_pool_use()
        _used = True
    return _used


def pool_available() -> bool:
    """Whether `use_pool` would give one; compiles it where that has not been done."""
    return os.environ.get(SWITCH) != "0" and _library() is not None


def pool_bytes() -> PoolBytes | None:
    """What the pool of this process holds; None where none is used."""
    library = _library() if _used else None
    if library is None:
        return None
    numbers = [ctypes.c_int64() for _ in PoolBytes._fields]
    library.sbft_pool_read(*map(ctypes.byref, numbers))
    return PoolBytes(*(number.value for number in numbers))


def trim_pool() -> None:
    """Give back what is kept, and begin the peak anew."""
    library = _library() if _used else None
    if library is not None:
        library.sbft_pool_trim()


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-O2",
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    try:
        path = build(
            _SOURCE,
            [*flags, f"-I{torch_folder / 'include'}"],
            libraries=[f"-L{torch_folder / 'lib'}", "-lc10"],
            facts=[torch.__version__],
        )
        library = ctypes.CDLL(str(path))
    except (CompilerMissing, OSError):
        return None  # the kernels, which matter more, warn of it
    library.sbft_pool_read.argtypes = [ctypes.c_void_p] * len(PoolBytes._fields)
    for name in ("use", "trim", "read"):
        getattr(library, f"sbft_pool_{name}").restype = None
    return library
