"""Copies and compares weights on a grid."""

from __future__ import annotations

import torch

from sbft.grid.codes import Quantized


def copy_of(weight: Quantized) -> Quantized:
    """The same weight in memory of its own."""
    low = None if weight.low is None else weight.low.clone()
    return weight.with_tensors(weight.codes.clone(), low, weight.scales.clone())


def same(one: Quantized, other: Quantized) -> bool:
    """Whether two weights are stored in the same bits."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.view(torch.uint8), other.tensors[name].view(torch.uint8))
        for name, tensor in one.tensors.items()
    )
