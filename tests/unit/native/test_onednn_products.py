"""Matrix products compiled by oneDNN: how many stay, and their memory. In other processes, as a cache is created once."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbft.native import onednn_products as compiled_products
from sbft.native.onednn_products import MOST_BYTES_EACH, MOST_KEPT, bytes_each, products_bytes

MULTIPLIES = products_bytes(1) > 0
by_onednn = pytest.mark.skipif(not MULTIPLIES, reason="oneDNN does not multiply bfloat16 on this CPU")


def printed(code: str, **environment: str) -> int:
    """The number that a process with this code prints."""
    return int(output(code, **environment))


def output(code: str, **environment: str) -> str:
    """The output of a process with this code, in an environment that sets no other cache capacity."""
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
    return done.stdout


def risen_bytes(code: str, **environment: str) -> int:
    """By how much a process grows in four times `MOST_KEPT` products of different shapes, once the cache is full."""
    work = """
        import torch
        from sbft.native.onednn_products import keep_few_products
        from sbft.native.memory import resident_bytes
        from sbft.native.memory_pool import use_pool
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
        multiply(range(2, 8 * MOST, 2))
        print(resident_bytes() - begin)
    """.replace("MOST", str(MOST_KEPT))
    return printed(textwrap.dedent(work) + code + textwrap.dedent(measure), **environment)


@by_onednn
def test_of_many_products_few_are_kept_unless_the_environment_wants_more() -> None:
    """Beyond `MOST_KEPT`, each new product replaces an old one; by default they would all stay."""
    few = risen_bytes("keep_few_products()")
    many = risen_bytes("keep_few_products()", LRU_CACHE_CAPACITY="4096", ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096")
    assert many > 0
    assert few < 0.15 * many


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX512_CORE_BF16", "AVX2"])
def test_what_a_product_takes_is_measured_for_the_instructions_there_are(instructions: str) -> None:
    """The measured size is that of further products of other shapes, whatever instructions oneDNN compiles them for."""
    code = """
        import json
        import torch
        from sbft.native.onednn_products import _multiply, measure
        from sbft.native.memory import resident_bytes
        each = measure()
        begin = resident_bytes()
        count = sum(_multiply(rows, *shape) for rows in range(9, 160, 8) for shape in ((256, 256), (512, 1024)))
        risen = (resident_bytes() - begin) // count
        print(json.dumps([each, risen, torch.ops.mkldnn._is_mkldnn_bf16_supported()]))
    """
    found = json.loads(
        output(
            textwrap.dedent(code),
            ONEDNN_MAX_CPU_ISA=instructions,
            LRU_CACHE_CAPACITY="4096",
            ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096",
        )
    )
    each, risen, compiles = found
    if compiles:
        assert 0 < each <= MOST_BYTES_EACH
        assert risen == pytest.approx(each, rel=0.3)
    else:
        assert max(each, risen) < 50_000  # nothing is compiled, and `products_bytes` counts nothing


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is told to map on Linux alone")
def test_where_there_is_no_pool_memory_of_large_tensors_is_used_again() -> None:
    work = """
        import resource, torch
        from sbft.native.onednn_products import keep_few_products
        keep_few_products()
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(100):
            torch.ones(1 << 20, dtype=torch.uint8)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
    """
    # Tensors that are mapped anew fault on each of their pages; malloc must do this only to the first few.
    assert printed(textwrap.dedent(work), SBFT_MEMORY_POOL="0") < 25 * (1 << 20) // mmap.PAGESIZE


@by_onednn
def test_no_more_are_counted_than_the_environment_lets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    assert products_bytes(3) == 3 * bytes_each() and products_bytes(10_000) == MOST_KEPT * bytes_each()
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1000")
    assert products_bytes(10_000) == 1000 * bytes_each()
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "many")  # not a number
    assert products_bytes(10_000) == 1000 * bytes_each()


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty user cache, and nothing measured yet in this process."""
    monkeypatch.setattr(compiled_products, "cache_dir", lambda: tmp_path)
    bytes_each.cache_clear()
    yield
    bytes_each.cache_clear()


def test_what_a_product_takes_is_measured_once_for_each_set_of_instructions(
    monkeypatch: pytest.MonkeyPatch, unknown: None
) -> None:
    answers = iter([600_000, 800_000])
    monkeypatch.setattr(compiled_products, "_measured_elsewhere", lambda: next(answers))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert bytes_each() == 600_000
    for instructions, expected in ((None, 600_000), ("AVX512_CORE", 800_000), (None, 600_000)):
        bytes_each.cache_clear()  # as in another process
        if instructions is None:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        else:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", instructions)
        assert bytes_each() == expected


@pytest.mark.parametrize("answer", [OSError("no such Python"), subprocess.CalledProcessError(1, "python")], ids=type)
def test_what_cannot_be_measured_is_bounded_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, unknown: None, answer: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise answer

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.warns(UserWarning, match="could not be measured"):
        assert bytes_each() == MOST_BYTES_EACH
