"""The matrix products that oneDNN compiles on a CPU, and how many of them a process keeps.

Torch multiplies bfloat16 matrices on a CPU by oneDNN, which compiles each product for its shapes, the number of rows among
them: every further length of examples takes some fifteen products more, of a millisecond or a few each. Two caches keep
what was compiled, torch's for descriptions and oneDNN's for code, and each holds 1,024 before it forgets any: 0.8 GiB, more
than all that a model of 135 million weights takes in training at batch size 1.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from sbft.memory_pool import pool_bytes

MOST_KEPT = 128
"""Of each cache, here: the products of eight lengths or so. What it saves and costs: benchmarks/README.md."""
BYTES_EACH = round(0.8 * (1 << 20))
"""Measured, resident, of 49 row counts of each of 18 products between 576 x 192 and 512 x 1792 in forward and backward: 0.68 to
1.07 MiB."""
_DESCRIPTION_BYTES = 128 << 10
"""Less than what the description of a product takes, 258 KiB."""
_M_MMAP_THRESHOLD = -3  # <malloc.h>
# Of ideep, the layer of torch's over oneDNN, and of oneDNN itself; each reads its own once, at the first product.
_SWITCHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def keep_few_products() -> None:
    """Let this process keep `MOST_KEPT` compiled products, unless the environment says another number.

    To be called before the first product in bfloat16, later it does nothing, and after `use_pool`: where large tensors come
    from a pool, malloc from then on maps what is as large as a description by itself, so that a forgotten one's memory goes
    back; among others it left gaps of a quarter of their size. Without a pool every tensor of that size would be mapped anew
    too, and its pages cleared: a forward of 256 tokens through SmolLM2-135M took 16 to 36 % longer.
    """
    for name in _SWITCHES:
        os.environ.setdefault(name, str(MOST_KEPT))
    if sys.platform == "linux" and pool_bytes() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _DESCRIPTION_BYTES)


def products_bytes(products: int) -> int:
    """What so many products of different shapes take on this machine's CPU, as many of them as are kept; bytes.

    The larger cache of the two decides, as the environment says it.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    given = [os.environ.get(name, "") for name in _SWITCHES]
    kept = max(int(one) if one.isdecimal() else MOST_KEPT for one in given)
    return min(products, kept) * BYTES_EACH
