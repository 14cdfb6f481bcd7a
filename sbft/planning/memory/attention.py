"""Attention on the meta device, with the memory that the kernels of the simulated device would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sbft.training.plain_attention import PLAIN_ATTENTION_TOKENS


def attention_on(device: str, tokens: int) -> Callable[..., Tensor]:
    """A replacement of `torch.nn.functional.scaled_dot_product_attention` that runs the kernel the device would run.

    On CUDA this is flash attention (or cuDNN's, which needs about as much memory) without a mask, and memory-efficient
    attention with a mask or in float32. The latter does not support grouped queries, which transformers asks for wherever
    there is no mask. So such a model in float32 falls back to torch's plain attention, which keeps the probabilities of every
    layer. On a CPU it is plain attention for short rows, else torch's flash kernel for CPUs.

    Args:
        device: "cpu" or "cuda".
        tokens: length of the rows.
    """
    plain = device != "cuda" and tokens <= PLAIN_ATTENTION_TOKENS
    aten: Any = torch.ops.aten

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        result: Tensor
        flash = device == "cuda" and attn_mask is None and query.dtype != torch.float32
        unsupported = device == "cuda" and enable_gqa and query.shape[-3] > key.shape[-3] and not flash
        if plain or unsupported:
            result, *_ = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return result
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if device != "cuda":
            result, *_ = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        elif flash:
            result, *_ = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
            result, *_ = aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
            )
        return result

    return attention
