"""The memory that a run may take, and whether it is enough."""

from __future__ import annotations

from typing import Literal

import torch

from sbft.native.memory import available_bytes

SURE = 0.95
"""A prediction above this share of the memory is called tight: its error may exceed the rest."""
_OF_WHAT_IS_FREE = 0.9
"""The rest is a margin: other programs may take it meanwhile, and a process that runs out is killed without a message."""


def usable_bytes(device: torch.device) -> int | None:
    """The highest resident memory that this process may reach; None on CUDA.

    On CUDA, running out of memory raises an error that can be handled, so it need not be avoided.
    """
    if device.type == "cuda":
        return None
    return round(_OF_WHAT_IS_FREE * available_bytes(device))


def does_it_fit(needed_bytes: int, memory_bytes: int) -> Literal["yes", "tight", "no"]:
    """Whether a predicted need fits into the available memory; "tight" where the prediction may be too low."""
    if needed_bytes > memory_bytes:
        return "no"
    return "yes" if needed_bytes <= SURE * memory_bytes else "tight"
