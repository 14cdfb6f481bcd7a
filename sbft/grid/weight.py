"""The weight of a model that is stored on a grid.

Autograd, modules, hooks and any trainer see a bfloat16 tensor: `nn.Parameter(GridWeight.of(values, INT8))`. Its
gradient is a plain bfloat16 tensor. Products and embeddings read its values from a buffer that is reused
(`sbft.grid.operations`); what backward saves are codes, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbft.grid import codes, values
from sbft.grid.formats import Grid
from sbft.grid.operations import perform
from sbft.grid.tensor import GridTensor, rebuild


class GridWeight(GridTensor):
    """A bfloat16 tensor that is stored as codes and scales; see `GridTensor`."""

    @classmethod
    def of(cls, dense: Tensor, grid: Grid) -> GridWeight:
        """A weight with these values, each rounded to the nearest on the grid.

        Args:
            dense: float32 or bfloat16 of shape (..., C), C a multiple of 32.
            grid: the grid.

        Raises:
            ValueError: if no tensor of this shape can be on a grid.
        """
        with torch.no_grad():
            return cls(values.quantize(dense.detach(), grid))

    @classmethod
    def empty(cls, shape: Sequence[int], grid: Grid, device: torch.device | str | None = None) -> GridWeight:
        """A weight with uninitialized codes and scales.

        Raises:
            ValueError: if no tensor of this shape can be on a grid.
        """
        return cls(codes.empty(grid, torch.Size(shape), device))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operations below autograd."""
        for kind in types:
            if not issubclass(kind, GridTensor):
                return NotImplemented
        return perform(func, args, kwargs or {})


# What torch.load(weights_only=True) may call.
torch.serialization.add_safe_globals([GridWeight, rebuild])
