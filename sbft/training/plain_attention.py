"""Torch's plain attention in the place of its flash kernel, where that is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Up to this length, torch's plain attention is faster than its flash kernel on a CPU in bfloat16 (forward and backward,
# 9 heads of 64, 2 cores: 1.2 against 15.9 ms at 40 tokens, 20 against 52 at 256, but 183 against 66 at 512).
PLAIN_ATTENTION_TOKENS = 256


@contextlib.contextmanager
def fast_attention(inputs: Any) -> Iterator[None]:
    """Around a step: plain attention for short examples on a CPU. Backward belongs in it too, as it may recompute forward.

    Args:
        inputs: a batch of any kind; if it has `input_ids`, these give length and device.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and ids.device.type == "cpu" and ids.shape[-1] <= PLAIN_ATTENTION_TOKENS:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
