"""Sizes of memory, as people read and type them; imports nothing heavy."""

from __future__ import annotations

from sbft.errors import RecipeError

GIB, MIB = 1 << 30, 1 << 20


def gib(size_bytes: float, digits: int = 2) -> str:
    """A size in GiB with its unit, such as `1.50 GiB`."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def mib(size_bytes: float, digits: int = 0) -> str:
    """A size in MiB with its unit, such as `257 MiB`."""
    return f"{size_bytes / MIB:.{digits}f} MiB"


def parse_bytes(text: str, option: str) -> int:
    """The bytes in a size such as `20GiB` or `24GB`.

    Args:
        text: number and unit.
        option: the command-line option that it was given to.

    Raises:
        RecipeError: if the text is not a size, or is below 1 MiB.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < MIB:  # `24` alone would be bytes
        raise RecipeError(f"{option} is {text!r}, expected a size of memory such as 20GiB or 24GB.")
    return size
