"""Simulates how much memory a CPU's allocators keep resident for a sequence of allocations.

With `memory_pool` this is the peak of what is in use. With the C library's malloc it is more, because freed memory stays.

`Heap` models glibc's malloc (mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):

- The heap grows at its end, which is given back to the system when enough of it is free.
- A request takes the smallest free chunk that fits. A freed chunk is joined with free neighbours.
- Large requests are mapped separately. A request is large if it is at least as large as every mapped one freed so far.

Torch asks for memory aligned to 64 bytes. To align it, glibc looks for a chunk that is larger by the alignment, takes the
aligned part and frees the rest. The place of a freed tensor therefore does not fit the next tensor of the same size, unless a
neighbour is free too. Most memory is lost this way.

`Heap` is for runs without the pool: no compiler, `SBFT_MEMORY_POOL=0`, or not Linux. On 56 such runs, predictions have a
median error of 3.7 % with it. Without it, every prediction is too low, by 23 % in the median.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from sbft.native.memory_pool import PAGE_BYTES, SMALLEST_BYTES

_ALIGNMENT = 64
_GRANULE = 16  # glibc's own alignment
_HEADER = 16  # between a chunk's start and the address that the caller gets
_SMALLEST = 32
_SMALL = 1024
_GOLDEN = 0.6180339887498949  # its multiples, less their whole part, are spread evenly
# Measured on 16 runs of SmolLM2-135M at 64 to 1024 tokens: values of 0.3 to 0.4 fit best, and 0 is 15 to 25 % too low.
_PINNED = 0.35
_TOP_PAD = 128 << 10
_FIRST_THRESHOLD = 128 << 10
_LARGEST_THRESHOLD = 32 << 20
_TRIMS_FROM = 64 << 10


class Heap:
    """A heap, empty at first.

    Attributes:
        resident_bytes: bytes that are resident now.
        peak_bytes: the highest `resident_bytes` so far.
    """

    def __init__(self, pinned: float = _PINNED) -> None:
        self._pinned = pinned
        self._pieces = 0
        self._threshold = _FIRST_THRESHOLD
        self._trim_threshold = _FIRST_THRESHOLD
        self._top = 0  # end of the last chunk: everything after it is free
        self._end = 0  # end of the memory that the kernel has granted
        self._touched = 0  # bytes from the start of the heap that have been in use
        self._mapped = 0
        self._chunks: dict[int, tuple[int, int]] = {}  # by the caller's number: start (-1: mapped) and size
        self._free_by_size: list[tuple[int, int]] = []  # size and start
        self._free_from: dict[int, int] = {}  # end by start
        self._free_to: dict[int, int] = {}  # start by end
        self.peak_bytes = 0

    @property
    def resident_bytes(self) -> int:
        """Resident bytes of the heap and of mapped requests."""
        return self._touched + self._mapped

    def allocate(self, number: int, size: int) -> None:
        """Allocate `size` bytes; the caller's `number` identifies them."""
        need = max(_up(size + _HEADER // 2, _GRANULE), _SMALLEST)
        asked = need + _ALIGNMENT + _SMALLEST
        place = bisect_left(self._free_by_size, (asked, -1))
        if place < len(self._free_by_size):
            length, start = self._free_by_size[place]
            self._take(start, length)
            self._carve(number, start, start + length, need)
        elif self._end - self._top >= asked:
            self._carve_top(number, asked, need)
        elif asked >= self._threshold:
            self._mapped += _up(asked, PAGE_BYTES)
            self._chunks[number] = (-1, _up(asked, PAGE_BYTES))
        else:
            self._end = _up(self._top + asked + _TOP_PAD, PAGE_BYTES)
            self._carve_top(number, asked, need)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def _carve_top(self, number: int, asked: int, need: int) -> None:
        start, self._top = self._top, self._top + asked
        self._touched = max(self._touched, self._top)
        self._carve(number, start, self._top, need)

    def _carve(self, number: int, start: int, end: int, need: int) -> None:
        """Take the aligned part of a chunk, and free what is before and after it."""
        aligned = _up(start + _HEADER, _ALIGNMENT) - _HEADER
        if 0 < aligned - start < _SMALLEST:
            aligned += _ALIGNMENT
        self._leave(start, aligned)
        if end - (aligned + need) >= _SMALLEST:
            self._leave(aligned + need, end)
            end = aligned + need
        self._chunks[number] = (aligned, end - aligned)

    def _leave(self, start: int, end: int) -> None:
        """Free the remains beside an aligned chunk; small objects soon occupy some of the small ones."""
        if 0 < end - start < _SMALL:
            self._pieces += 1
            if self._pieces * _GOLDEN % 1.0 < self._pinned:
                return
        if end > start:
            self._release(start, end)

    def free(self, number: int) -> None:
        """Free the allocation with this number; does nothing if it was not made here."""
        if number not in self._chunks:
            return
        start, size = self._chunks.pop(number)
        if start < 0:
            self._mapped -= size
            if self._threshold < size <= _LARGEST_THRESHOLD:
                self._threshold, self._trim_threshold = size, 2 * size
            return
        self._release(start, start + size)

    def _release(self, start: int, end: int) -> None:
        """Free a part of the heap and join it with free neighbours."""
        if start in self._free_to:
            before = self._free_to[start]
            self._take(before, start - before)
            start = before
        if end in self._free_from:
            after = self._free_from[end]
            self._take(end, after - end)
            end = after
        if end == self._top:
            self._top = start
        else:
            self._give(start, end)
        if end - start >= _TRIMS_FROM and self._end - self._top >= self._trim_threshold:
            self._end = _up(self._top + _TOP_PAD, PAGE_BYTES)
            self._touched = min(self._touched, self._end)

    def _take(self, start: int, length: int) -> None:
        self._free_by_size.pop(bisect_left(self._free_by_size, (length, start)))
        self._free_to.pop(self._free_from.pop(start))

    def _give(self, start: int, end: int) -> None:
        insort(self._free_by_size, (end - start, start))
        self._free_from[start] = end
        self._free_to[end] = start


class PooledHeap:
    """A heap whose large blocks come from a memory pool."""

    def __init__(self) -> None:
        self._heap = Heap()
        self._in_pool: dict[int, int] = {}
        self._in_use = 0
        self._peak = 0

    @property
    def peak_bytes(self) -> int:
        """The sum of both peaks. They add up even if reached at different times, because a pool keeps what it freed."""
        return self._peak + self._heap.peak_bytes

    def allocate(self, number: int, size: int) -> None:
        """As `Heap.allocate`."""
        if size < SMALLEST_BYTES:
            self._heap.allocate(number, size)
            return
        self._in_pool[number] = _up(size, PAGE_BYTES)
        self._in_use += self._in_pool[number]
        self._peak = max(self._peak, self._in_use)

    def free(self, number: int) -> None:
        """As `Heap.free`."""
        if number in self._in_pool:
            self._in_use -= self._in_pool.pop(number)
        else:
            self._heap.free(number)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
