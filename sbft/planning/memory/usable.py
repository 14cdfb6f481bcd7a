"""The memory that a run on this machine may take."""

from __future__ import annotations

import torch

from sbft.native.memory import available_bytes

_OF_WHAT_IS_FREE = 0.9
"""Where memory ends, the kernel kills without a word, and other programs take memory meanwhile."""


def usable_bytes(device: torch.device) -> int | None:
    """The highest resident memory that this process can have; None on CUDA.

    There, running out of memory is an error like any other, so that it need not be foreseen.
    """
    if device.type == "cuda":
        return None
    return round(_OF_WHAT_IS_FREE * available_bytes(device))
