"""How figures are written for people; what was not measured is an empty cell."""

from __future__ import annotations

import textwrap

from sbft.bench.report.statistics import Estimate

GIBIBYTE, MEBIBYTE = 1 << 30, 1 << 20
_LONGEST_REASON = 200
_MINUS = "\N{MINUS SIGN}"
_SMALL = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def estimate(value: Estimate | None, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """Mean ± standard error, such as `87.3 ± 1.2`."""
    if value is None:
        return ""
    # Adding 0.0 makes a zero of a negative zero.
    mean = round(scale * value.mean, digits) + 0.0
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", _MINUS)
    return text if value.standard_error is None else f"{text} ± {scale * value.standard_error:.{digits}f}"


def gibibytes(count: float | None) -> str:
    """Bytes as GiB without the unit."""
    return "" if count is None else f"{count / GIBIBYTE:.2f}"


def mebibytes(count: float | None) -> str:
    """Bytes as MiB without the unit."""
    if count is None:
        return ""
    return f"{count / MEBIBYTE:.{0 if count >= 100 * MEBIBYTE else 1}f}"


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


def duration(seconds: float | None) -> str:
    """Such as `48 s`, `12 min`, `1 h 05 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(value: float | None) -> str:
    """A learning rate."""
    return "" if value is None else f"{value:g}"


def reason(text: str | None) -> str:
    """The beginning of an error, on one line."""
    first = (text or "").strip().splitlines() or [""]
    return textwrap.shorten(first[0], _LONGEST_REASON, placeholder=" …")


def superscript(number: int) -> str:
    """The mark of a footnote."""
    return "".join(_SMALL[int(digit)] for digit in str(number))
