"""The memory that a run on this machine may take."""

from __future__ import annotations

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from sbft.errors import RecipeError
from sbft.native.memory import available_bytes

_SMALLEST = 1 << 20
_OF_WHAT_IS_FREE = 0.9
"""Where memory ends, the kernel kills without a word, and other programs take memory meanwhile."""


def usable_bytes(device: torch.device) -> int | None:
    """The highest resident memory that this process can have; None on CUDA.

    There, running out of memory is an error like any other, so that it need not be foreseen.
    """
    if device.type == "cuda":
        return None
    return round(_OF_WHAT_IS_FREE * available_bytes(device))


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size such as `20GiB` or `24GB`.

    Args:
        text: number and unit.
        option: of the command line that it was given by.

    Raises:
        RecipeError: if it is none.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < _SMALLEST:  # `24` alone would be bytes
        raise RecipeError(f"{option} is {text!r}, expected a size of memory such as 20GiB or 24GB.")
    return size
