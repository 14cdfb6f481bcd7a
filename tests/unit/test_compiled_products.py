"""The matrix products that oneDNN compiles: how many stay, what they take; a cache is made once, so in other processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap

import pytest

from sbft.compiled_products import BYTES_EACH, MOST_KEPT, products_bytes

pytestmark = pytest.mark.skipif(products_bytes(1) == 0, reason="oneDNN does not multiply bfloat16 on this CPU")


def printed(code: str, **environment: str) -> int:
    """The number that a process prints, whose environment says nothing else of what is kept."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**given, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def risen_bytes(code: str, **environment: str) -> int:
    """By what a process rises in three times `MOST_KEPT` products of different shapes, after as many as are kept."""
    work = """
        import torch
        from sbft.compiled_products import keep_few_products
        from sbft.memory import resident_bytes
        from sbft.memory_pool import use_pool
        use_pool()
        left, right = torch.randn(1024, 256).bfloat16(), torch.randn(256, 256).bfloat16()
        out = torch.empty_like(left)
        def multiply(numbers):
            for rows in numbers:
                torch.mm(left[:rows], right, out=out[:rows])
    """
    measure = """
        multiply(range(1, 2 * MOST, 2))
        begin = resident_bytes()
        multiply(range(2, 6 * MOST, 2))
        print(resident_bytes() - begin)
    """.replace("MOST", str(MOST_KEPT))
    return printed(textwrap.dedent(work) + code + textwrap.dedent(measure), **environment)


def test_of_many_products_few_are_kept_unless_the_environment_wants_more() -> None:
    """Of products beyond `MOST_KEPT` each new one takes the place of an old one; by default they would all stay."""
    others = 3 * MOST_KEPT
    few = risen_bytes("keep_few_products()")
    many = risen_bytes("keep_few_products()", LRU_CACHE_CAPACITY="4096", ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096")
    assert few < 0.15 * others * BYTES_EACH
    assert 0.7 * others * BYTES_EACH < many < 1.4 * others * BYTES_EACH


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is told to map on Linux alone")
def test_where_there_is_no_pool_memory_of_large_tensors_is_used_again() -> None:
    work = """
        import resource, torch
        from sbft.compiled_products import keep_few_products
        keep_few_products()
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(100):
            torch.ones(1 << 20, dtype=torch.uint8)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
    """
    # Mapped anew, each of them takes a fault for each of its pages; malloc does that to the first few alone.
    assert printed(textwrap.dedent(work), SBFT_MEMORY_POOL="0") < 25 * (1 << 20) // mmap.PAGESIZE


def test_no_more_are_counted_than_the_environment_lets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    assert products_bytes(3) == 3 * BYTES_EACH and products_bytes(10_000) == MOST_KEPT * BYTES_EACH
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1000")
    assert products_bytes(10_000) == 1000 * BYTES_EACH
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "many")  # no number
    assert products_bytes(10_000) == 1000 * BYTES_EACH
