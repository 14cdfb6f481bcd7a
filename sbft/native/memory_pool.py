"""A pool that reuses the memory of large CPU tensors, and never holds more than was in use at once.

Without it, torch takes CPU tensors from the C library. Memory freed between two tensors that stay is a gap there, and counts
as held. Memory that the C library returns to the kernel is cleared again, page by page, when it is next used. In 56 measured
runs, gaps made up a fifth of what training takes beyond the model in the median, and two thirds in the worst run
(benchmarks/README.md).

The pool (memory_pool.cpp, compiled on first use) maps each tensor of 64 KiB or more separately. Freed memory is kept for the
next tensor of that size, and its pages need not be cleared. Before the pool maps anything new, it returns enough kept memory
to the kernel that it never holds more than the most that was ever in use. So the peak is that of the tensors themselves, to
within a page each.
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
    """Freed, but not returned to the kernel."""
    peak: int
    """The most in use since the pool was last trimmed."""


def use_pool() -> bool:
    """Take all further large CPU tensors of this process from a pool. This cannot be undone.

    Existing tensors are left as they are. To do without the pool, set `SBFT_MEMORY_POOL=0` in the environment.

    Returns:
        Whether the pool is in use now. It requires Linux and a C++ compiler.
    """
    global _used
    if not _used and pool_available():
        library = _library()
        assert library is not None
        library.sbft_pool_use()
        _used = True
    return _used


def pool_available() -> bool:
    """Whether `use_pool` would work; compiles the pool if that has not been done."""
    return os.environ.get(SWITCH) != "0" and _library() is not None


def pool_bytes() -> PoolBytes | None:
    """What the pool of this process holds; None if it uses none."""
    library = _library() if _used else None
    if library is None:
        return None
    numbers = [ctypes.c_int64() for _ in PoolBytes._fields]
    library.sbft_pool_read(*map(ctypes.byref, numbers))
    return PoolBytes(*(number.value for number in numbers))


def trim_pool() -> None:
    """Return all kept memory to the kernel, and reset the peak."""
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
        return None  # no warning: the kernels, which matter more, give one
    library.sbft_pool_read.argtypes = [ctypes.c_void_p] * len(PoolBytes._fields)
    for name in ("use", "trim", "read"):
        getattr(library, f"sbft_pool_{name}").restype = None
    return library
