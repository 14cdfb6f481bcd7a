"""Large tensors on a CPU in pages of 2 MiB."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, not yet written to, whose memory the kernel may now give in pages of 2 MiB instead of 4 KiB.

    The allocator takes large tensors from the kernel anew each time, which clears every page on its first touch: writing
    54 MiB takes 28 ms on one core, in huge pages 11. Does nothing off Linux, off the CPU, or to small tensors.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" or sys.platform != "linux" or storage.nbytes() < 2 * _HUGE_PAGE:
        return tensor
    page = mmap.PAGESIZE
    first = -(-storage.data_ptr() // page) * page
    length = (storage.data_ptr() + storage.nbytes() - first) // page * page
    # What it returns is of no interest: a kernel without huge pages gives small ones, as before.
    _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
