"""Memory that is mapped from files: its pages are given back once what was in them has been copied.

A page of a file that was read stays in this process's resident memory until the whole file is unmapped, which is when the last
tensor in it is gone. A model that is copied weight by weight would be there twice.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from bisect import bisect_right
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux: the next access reads the file again


class MappedFiles:
    """The files that are mapped into this process's memory now; none where the system is not Linux."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for line in _MAPS.read_text().splitlines() if _MAPS.is_file() else ():
            addresses, mode, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and mode.endswith("p") and path and path[0].endswith(".safetensors"):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                self._begins.append(begin)
                self._ends.append(end)

    def forget(self, address: int, size_bytes: int) -> None:
        """Give the pages of some memory back, if it is mapped from a file; nobody may have changed what is in them.

        Pages that are in it only in part are kept.
        """
        place = bisect_right(self._begins, address) - 1
        if place < 0 or address + size_bytes > self._ends[place]:
            return
        page = mmap.PAGESIZE
        begin, end = -(-address // page) * page, (address + size_bytes) // page * page
        if begin < end:
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
