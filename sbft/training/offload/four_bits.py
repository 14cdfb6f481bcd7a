"""Frozen weights in 4 bits of bitsandbytes, whose backward would read the memory that they were in during forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_bitsandbytes_available

from sbft.training.offload.storage import StreamedLayer


def streamed_products(
    module: nn.Module, layer: StreamedLayer, need: Callable[[StreamedLayer], object]
) -> Iterator[Any]:
    """Let products with a layer's weights in 4 bits bring the layer in backward, until what is yielded is called.

    Args:
        module: the layer.
        layer: its weights.
        need: has it on the device.

    Yields:
        For each product, what restores it.
    """
    if not is_bitsandbytes_available() or not any(parameter.dtype == torch.uint8 for parameter in layer.parameters):
        return
    from bitsandbytes.nn import Linear4bit

    for linear in module.modules():
        if isinstance(linear, Linear4bit) and any(linear.weight is parameter for parameter in layer.parameters):
            vars(linear)["forward"] = functools.partial(_forward, linear, functools.partial(need, layer))
            yield functools.partial(vars(linear).pop, "forward")


def _forward(linear: Any, need: Callable[[], object], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return type(linear).forward(linear, x)
    result: Tensor = _Product.apply(x, linear, need)
    return result


class _Product(torch.autograd.Function):
    """The product of bitsandbytes, whose backward reads the weight where it is then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any, need: Callable[[], object]) -> Tensor:
        ctx.linear, ctx.need, ctx.dtype = linear, need, x.dtype
        return type(linear).forward(linear, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        ctx.need()
        weight = ctx.linear.weight
        grad = grad.to(ctx.dtype if ctx.linear.compute_dtype is None else ctx.linear.compute_dtype)
        dense = dequantize_4bit(weight.data.view(-1, 1), weight.quant_state).to(grad.dtype)
        return torch.matmul(grad, dense).to(ctx.dtype), None, None
