"""Formats numbers for people. What was not measured is an empty cell."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from sbft.bench.report.statistics import Estimate
from sbft.native.sizes import GIB, MIB

_LONGEST_REASON = 200
_MINUS = "\N{MINUS SIGN}"
_PROCESSOR = re.compile(r"(?P<name>.+), (?P<threads>\d+) (core|thread)s?")
_SMALL = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def estimate(value: Estimate | None, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """Mean ± standard error, such as `87.3 ± 1.2`."""
    if value is None:
        return ""
    # Adding 0.0 turns a negative zero into zero.
    mean = round(scale * value.mean, digits) + 0.0
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", _MINUS)
    return text if value.standard_error is None else f"{text} ± {scale * value.standard_error:.{digits}f}"


def gibibytes(count: float | None) -> str:
    """Bytes as GiB without the unit."""
    return "" if count is None else f"{count / GIB:.2f}"


def mebibytes(count: float | None) -> str:
    """Bytes as MiB without the unit."""
    if count is None:
        return ""
    return f"{count / MIB:.{0 if count >= 100 * MIB else 1}f}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as ms without the unit."""
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 2}f}"


def millions(count: float | None) -> str:
    """A count in millions."""
    if count is None:
        return ""
    return f"{count / 1e6:.{1 if count >= 1e6 else 3}f}"


def whole(number: float | None) -> str:
    """A number without decimals."""
    return "" if number is None else f"{number:.0f}"


def rate(value: float | None) -> str:
    """A learning rate."""
    return "" if value is None else f"{value:g}"


def reason(text: str | None) -> str:
    """The beginning of an error, on one line."""
    first = (text or "").strip().splitlines() or [""]
    return textwrap.shorten(first[0], _LONGEST_REASON, placeholder=" …")


def machines(runs: Iterable[tuple[str | None, int | None]]) -> str:
    """The machines of runs, such as `Intel Xeon Processor, 2 cores, 1 thread per run`.

    Args:
        runs: for each run, the device in its record (which counts torch's threads as cores), and the number of cores of
            its machine where known.
    """
    cores: dict[str, set[int]] = {}
    threads: dict[str, set[int]] = {}
    for device, machine_cores in runs:
        if not device:
            continue
        processor = _PROCESSOR.fullmatch(device)
        name = processor["name"] if processor else device
        cores.setdefault(name, set())
        threads.setdefault(name, set())
        if processor:
            threads[name].add(int(processor["threads"]))
            if machine_cores is not None:
                cores[name].add(machine_cores)
    return " / ".join(
        ", ".join(
            [name, *_counted(cores[name], "core"), *(f"{count} per run" for count in _counted(threads[name], "thread"))]
        )
        for name in cores
    )


def _counted(numbers: set[int], what: str) -> list[str]:
    if not numbers:
        return []
    return [f"{' / '.join(map(str, sorted(numbers)))} {what}{'' if numbers == {1} else 's'}"]


def superscript(number: int) -> str:
    """A footnote mark."""
    return "".join(_SMALL[int(digit)] for digit in str(number))
