"""The tensor class of weights on a grid: to torch, a bfloat16 tensor; its memory consists of codes and scales."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import warn_if_has_hooks

from sbft.grid import values
from sbft.grid.buffer import in_one_piece
from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid

_Self = TypeVar("_Self", bound="GridTensor")


class GridTensor(Tensor):
    """A bfloat16 tensor that is stored on a grid, or such a tensor with its last two dimensions swapped.

    A subclass must implement operations; see `sbft.grid.weight.GridWeight`.

    Args:
        quantized: codes and scales; they are not copied.
        transposed: whether the last two dimensions are swapped.

    Attributes:
        quantized: codes and scales, of the shape before dimensions are swapped. Call `mark_changed` after changing them
            in place.
        is_transposed: whether the last two dimensions are swapped.
    """

    quantized: Quantized
    is_transposed: bool

    # Operations reach `__torch_dispatch__`, below autograd, which sees a bfloat16 tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[_Self], quantized: Quantized, transposed: bool = False) -> _Self:
        """A tensor made of these codes and scales."""
        shape, strides = _layout(quantized.shape, transposed)
        made: _Self = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=torch.bfloat16, device=quantized.codes.device
        )
        return made

    def __init__(self, quantized: Quantized, transposed: bool = False) -> None:
        self.quantized = quantized
        self.is_transposed = transposed

    def around(self: _Self, quantized: Quantized, transposed: bool | None = None) -> _Self:
        """Another tensor of this class; its dimensions are swapped like this one's if `transposed` is None."""
        return type(self)(quantized, self.is_transposed if transposed is None else transposed)

    @property
    def grid(self) -> Grid:
        """The grid that it is stored on."""
        return self.quantized.grid

    @property
    def codes(self) -> Tensor:
        """Codes; see `Quantized`."""
        return self.quantized.codes

    @property
    def low(self) -> Tensor | None:
        """The lower four bits of codes on a grid of 12 bits; see `Quantized`."""
        return self.quantized.low

    @property
    def scales(self) -> Tensor:
        """Scales; see `Quantized`."""
        return self.quantized.scales

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.quantized.tensors.values())

    @property
    def data(self: _Self) -> _Self:
        """The same codes and scales without a history, as `data` of any tensor."""
        return self.around(self.quantized)

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, GridTensor) or other.shape != self.shape:
            raise TypeError(
                f"the data of a weight on a grid can only be replaced by another such weight of shape {tuple(self.shape)}, got "
                f"{other.dtype} of shape {tuple(other.shape)}. Use copy_ to round values to the grid; its dtype cannot be "
                "changed"
            )
        if other.device != self.device:
            Tensor.data.__set__(self, other)  # type: ignore[attr-defined]  # the device that torch takes it to be on
        self.quantized, self.is_transposed = other.quantized, other.is_transposed

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Its values in a plain tensor without a history; exact in float32, rounded to nearest in bfloat16."""
        with torch.no_grad():
            dense = values.dequantize(in_one_piece(self.quantized), dtype)
            return dense.transpose(-2, -1) if self.is_transposed else dense

    def __setitem__(self, index: Any, value: Any) -> None:
        """Round values to the grid. Unless they are for whole rows, every block with a changed value is rounded again."""
        if torch.is_grad_enabled() and self.requires_grad:
            raise RuntimeError(
                "a weight on a grid that requires a gradient cannot be changed in place: use torch.no_grad()"
            )
        part = self[index]
        if isinstance(part, GridTensor):
            part.copy_(torch.as_tensor(value, device=self.device))
            return
        dense = self.dequantize()
        dense[index] = value
        self.assign(dense)
        self.mark_changed()

    def assign(self, dense: Tensor) -> None:
        """Assign values of its shape. Blocks that already have these values stay unchanged, others are rounded to the grid."""
        with torch.no_grad():
            dense = dense.transpose(-2, -1) if self.is_transposed else dense
            present = values.dequantize(in_one_piece(self.quantized))
            differs = (present != dense).unflatten(-1, (-1, self.quantized.block)).any(-1)
            new = rounded(dense, self.quantized)
            for name, stored in self.quantized.tensors.items():
                blocks = stored.unflatten(-1, (differs.shape[-1], -1))
                stored.copy_(torch.where(differs[..., None], new.tensors[name].view(blocks.shape), blocks).flatten(-2))

    def mark_changed(self) -> None:
        """Increment `_version` after writing to codes or scales, so that backward refuses what it saved before."""
        torch.autograd.graph.increment_version(self)

    # Copies

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Grid, bool]]:
        """The names of its tensors, and its other attributes; torch's protocol for wrappers."""
        return list(self.quantized.tensors), (self.grid, self.is_transposed)

    @classmethod
    def __tensor_unflatten__(
        cls: type[_Self], inner: dict[str, Tensor], rest: tuple[Grid, bool], size: Any = None, stride: Any = None
    ) -> _Self:
        """The reverse of `__tensor_flatten__`."""
        grid, transposed = rest
        return cls(Quantized(grid, inner["codes"], inner.get("low"), inner["scales"]), transposed)

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        """A leaf with copies of codes, scales and gradient."""
        if id(self) in memo:
            copied: _Self = memo[id(self)]
            return copied
        if not self.is_leaf:
            raise RuntimeError("only a weight that is a leaf of the graph can be copied by deepcopy: detach it first")
        tensors = {name: tensor.clone() for name, tensor in self.quantized.tensors.items()}
        copied = self.__tensor_unflatten__(tensors, (self.grid, self.is_transposed))
        memo[id(self)] = copied
        _take_on(copied, self.requires_grad, _attributes(self, memo))
        if self.grad is not None:
            copied.grad = copy.deepcopy(self.grad, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle codes and scales, without the gradient, as for any tensor."""
        warn_if_has_hooks(self)
        grid = (self.grid.name, self.grid.largest, self.grid.block)
        whole = (type(self), grid, self.quantized.tensors, self.is_transposed, self.requires_grad, _attributes(self))
        return rebuild, whole

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and grid; no values."""
        kind = "Parameter, " if vars(self).get("_is_param") else ""
        return f"{type(self).__name__}({kind}shape={tuple(self.shape)}, grid={self.grid.name}, device={self.device})"


def rounded(dense: Tensor, like: Quantized) -> Quantized:
    """Values rounded to nearest on a weight's grid, in tensors of the same shapes as the weight's.

    Args:
        dense: any dtype and device, of the weight's shape.
        like: the weight, of one dimension or more.
    """
    dense = dense if dense.dtype in (torch.float32, torch.bfloat16, torch.float16) else dense.float()
    rows = dense.reshape(-1, dense.shape[-1]).to(like.codes.device).contiguous()
    made = values.quantize(rows, like.grid)
    shaped = {name: one.view(like.tensors[name].shape) for name, one in made.tensors.items()}
    return made.with_tensors(shaped["codes"], shaped.get("low"), shaped["scales"])


@functools.lru_cache(maxsize=1024)
def _layout(shape: torch.Size, transposed: bool) -> tuple[list[int], list[int]]:
    """Shape and strides of a contiguous tensor, or of one whose last two dimensions are swapped."""
    sizes, strides = list(shape), [math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape))]
    if transposed:
        sizes[-2:], strides[-2:] = sizes[:-3:-1], strides[:-3:-1]
    return sizes, strides


def rebuild(
    kind: type[_Self],
    grid: tuple[str, int, int],
    tensors: dict[str, Tensor],
    transposed: bool,
    requires_grad: bool,
    attributes: dict[str, Any],
) -> _Self:
    """Rebuild a tensor from a pickle."""
    made = kind.__tensor_unflatten__(tensors, (Grid(*grid), transposed))
    _take_on(made, requires_grad, attributes)
    return made


def _attributes(tensor: GridTensor, memo: dict[int, Any] | None = None) -> dict[str, Any]:
    """Attributes that others have set on a tensor, including that it is a parameter."""
    attributes = {name: value for name, value in vars(tensor).items() if name not in ("quantized", "is_transposed")}
    return attributes if memo is None else copy.deepcopy(attributes, memo)


def _take_on(tensor: GridTensor, requires_grad: bool, attributes: dict[str, Any]) -> None:
    vars(tensor).update(attributes)
    tensor.requires_grad_(requires_grad)
