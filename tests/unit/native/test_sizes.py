"""Memory sizes, as printed and as typed."""

from __future__ import annotations

import pytest

from sbft.errors import RecipeError
from sbft.native.sizes import GIB, MIB, gib, mib, parse_bytes


def test_sizes_are_printed_with_their_unit() -> None:
    assert gib(3 * GIB // 2) == "1.50 GiB" and gib(GIB, 1) == "1.0 GiB" and gib(0) == "0.00 GiB"
    assert mib(257 * MIB) == "257 MiB" and mib(MIB // 2, 1) == "0.5 MiB"


@pytest.mark.parametrize(("text", "size"), [("20GiB", 20 * GIB), ("24 GB", 24 * 10**9), ("512MiB", GIB // 2)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory-limit") == size


@pytest.mark.parametrize("text", ["much", "-1GiB", "0", ""])
def test_what_is_no_size_of_memory_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--memory-limit is .*20GiB"):
        parse_bytes(text, "--memory-limit")
