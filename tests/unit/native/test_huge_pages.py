"""Huge pages are requested where they can help, and change nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sbft.native.huge_pages import in_huge_pages


def _flags_of(address: int) -> list[str]:
    """The kernel's flags for the mapping that contains an address (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_a_large_tensor_is_marked_and_keeps_its_values() -> None:
    tensor = torch.empty(16 << 20, dtype=torch.uint8)
    marked = in_huge_pages(tensor)
    assert marked is tensor
    flags = _flags_of(tensor.data_ptr() + tensor.numel() // 2)
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags
    tensor.fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * tensor.numel()


def test_small_and_empty_tensors_pass_through() -> None:
    for count in (0, 1, 1000):
        tensor = torch.zeros(count)
        assert in_huge_pages(tensor) is tensor
