"""Implements torch's operations for weights on a grid, below autograd.

Products read the values from a buffer; embeddings and indexing read only the entries that they need. Rows, and the weight with
its last two dimensions swapped, are views that share codes and scales. So autograd saves codes for backward. Any other
operation works on a bfloat16 copy of all values, after one warning that names the operation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sbft.grid import values
from sbft.grid.buffer import borrow, give_back, in_one_piece
from sbft.grid.codes import Quantized
from sbft.grid.tensor import GridTensor, rounded

aten: Any = torch.ops.aten

_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_HANDLERS: dict[Any, _Handler] = {}
_warned: set[str] = set()


def perform(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an ATen operation with some arguments on a grid."""
    handler = _HANDLERS.get(func)
    result = NotImplemented if handler is None else handler(func, args, kwargs)
    return _with_copies(func, args, kwargs) if result is NotImplemented else result


def _handles(*operations: Any) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(operations, handler))
        return handler

    return register


# Products


@_handles(
    *(aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out, aten.mv.default, aten.addmv.default),
    *(aten.bmm.default, aten.bmm.out, aten.baddbmm.default, aten.dot.default),
)
def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations whose result shares no memory with their arguments."""
    if kwargs and any(isinstance(one, GridTensor) for one in kwargs.values()):  # out=
        return NotImplemented
    dense_args, taken = list(args), []
    is_empty = any(isinstance(one, Tensor) and not isinstance(one, GridTensor) and one.numel() == 0 for one in args)
    try:
        for place, one in enumerate(args):
            if isinstance(one, GridTensor) and is_empty:  # as where the head is handed no rows: no value matters
                dense_args[place] = torch.zeros((), dtype=one.dtype, device=one.device).expand(one.shape)
            elif isinstance(one, GridTensor):
                dense, memory = borrow(one.quantized)
                taken.append(memory)
                dense_args[place] = dense.transpose(-2, -1) if one.is_transposed else dense
        return func(*dense_args, **kwargs)
    finally:
        for memory in taken:
            give_back(memory)


@_handles(aten._grouped_mm.default)
def _grouped_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of experts. On a CPU, one expert after another, as in torch itself, so that only one is dense at a time."""
    rows, experts, *rest = args
    ends = rest[0] if rest else kwargs.get("offs")
    plain = not rest[1:] and not any(value is not None for name, value in kwargs.items() if name != "offs")
    if (
        not plain
        or ends is None
        or isinstance(rows, GridTensor)
        or rows.device.type != "cpu"
        or (rows.ndim, experts.ndim) != (2, 3)
    ):
        return _product(func, args, kwargs)
    result = rows.new_zeros(rows.shape[0], experts.shape[-1])
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            torch.mm(rows[start:stop], experts[expert], out=result[start:stop])
        start = stop
    return result


# Entries


@_handles(aten.embedding.default, aten.index_select.default)
def _entries(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, index = args[0], args[1]
    if func is aten.index_select.default:
        dim, index = args[1] % weight.ndim, args[2]
        if dim != 0:
            return NotImplemented
    return _gathered(weight, index)  # a negative index is refused, as torch does


@_handles(aten.index.Tensor)
def _indexed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, (first, *others) = args
    if first is None or any(one is not None for one in others) or first.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    return _gathered(weight, torch.where(first < 0, first + weight.shape[0], first))


def _gathered(weight: Any, index: Any) -> Any:
    if not isinstance(weight, GridTensor) or isinstance(index, GridTensor) or weight.is_transposed or weight.ndim < 2:
        return NotImplemented
    return values.dequantize_entries(in_one_piece(weight.quantized), index)


# Views


@_handles(aten.detach.default, aten.alias.default)
def _same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].around(args[0].quantized)


@_handles(aten.t.default)
def _swapped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    return tensor.around(tensor.quantized, not tensor.is_transposed) if tensor.ndim == 2 else NotImplemented


@_handles(aten.transpose.int, aten.permute.default)
def _permuted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, *dims = args
    order = list(range(tensor.ndim))
    if func is aten.permute.default:
        order = [dim % tensor.ndim for dim in dims[0]]
    else:
        first, second = (dim % tensor.ndim for dim in dims)
        order[first], order[second] = second, first
    if order == [*range(tensor.ndim)]:
        return tensor.around(tensor.quantized)
    if order == [*range(tensor.ndim - 2), tensor.ndim - 1, tensor.ndim - 2]:
        return tensor.around(tensor.quantized, not tensor.is_transposed)
    return NotImplemented


@_handles(aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _cut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A slice that keeps rows whole."""
    tensor, *rest = args
    rest += kwargs.values()
    last, place = tensor.ndim - 1, int(func in (aten.split.Tensor, aten.split_with_sizes.default))
    dim = rest[place] % tensor.ndim if len(rest) > place else 0
    stored_dim = {last: last - 1, last - 1: last}.get(dim, dim) if tensor.is_transposed else dim
    if func is aten.slice.Tensor and _is_whole(tensor.shape[dim], *rest[1:]):
        return tensor.around(tensor.quantized)
    removes_swapped = func in (aten.select.int, aten.unbind.int) and tensor.is_transposed and dim >= last - 1
    if stored_dim == last or removes_swapped:
        return NotImplemented
    arguments = [*rest[:place], stored_dim, *rest[place + 1 :]]
    stored = tensor.quantized
    cut = {name: func(one, *arguments) for name, one in stored.tensors.items()}
    if func in (aten.select.int, aten.slice.Tensor):
        return tensor.around(stored.with_tensors(cut["codes"], cut.get("low"), cut["scales"]))
    lows = cut.get("low", [None] * len(cut["codes"]))
    parts = zip(cut["codes"], lows, cut["scales"], strict=True)
    return [tensor.around(stored.with_tensors(*part)) for part in parts]


def _is_whole(size: int, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return (start or 0) in (0, -size) and (end is None or end >= size) and step == 1


@_handles(aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)
def _reshaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view that keeps rows whole."""
    tensor = args[0]
    if tensor.is_transposed:
        return NotImplemented
    with _disable_current_modes():
        shape = func(torch.empty(tensor.shape, device="meta"), *args[1:], **kwargs).shape
    stored = tensor.quantized
    if shape[-1:] != tensor.shape[-1:] or shape.numel() != tensor.numel() or stored is not in_one_piece(stored):
        return NotImplemented
    views = {name: one.view(*shape[:-1], one.shape[-1]) for name, one in stored.tensors.items()}
    return tensor.around(stored.with_tensors(views["codes"], views.get("low"), views["scales"]))


# Copies


@_handles(aten.clone.default)
def _cloned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].around(_each(args[0].quantized, Tensor.clone))


@_handles(aten._to_copy.default)
def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if dtype not in (None, torch.bfloat16) or kwargs.get("pin_memory"):
        return NotImplemented
    non_blocking = kwargs.get("non_blocking", False)
    stored = _each(tensor.quantized, lambda one: one.to(device or one.device, non_blocking=non_blocking, copy=True))
    return tensor.around(stored)


@_handles(aten.record_stream.default)
def _recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for one in args[0].quantized.tensors.values():
        func(one, *args[1:], **kwargs)


@_handles(aten.copy_.default)
def _copied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source, *rest = args
    if not isinstance(target, GridTensor):
        return func(target, source.dequantize(), *rest, **kwargs)
    stored = target.quantized
    if (
        isinstance(source, GridTensor)
        and source.grid == target.grid
        and source.is_transposed == target.is_transposed
        and source.shape == target.shape
    ):
        _write(stored, source.quantized)
        return target
    dense = source.dequantize(torch.float32) if isinstance(source, GridTensor) else source
    dense = dense.expand(target.shape)
    _write(stored, rounded(dense.transpose(-2, -1) if target.is_transposed else dense, stored))
    return target


def _each(stored: Quantized, change: Callable[[Tensor], Tensor]) -> Quantized:
    changed = {name: change(one) for name, one in stored.tensors.items()}
    return stored.with_tensors(changed["codes"], changed.get("low"), changed["scales"])


def _write(target: Quantized, source: Quantized) -> None:
    for name, one in target.tensors.items():
        one.copy_(source.tensors[name])


# Other tensors of the same kind: plain ones, such as gradients


@_handles(
    *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
    *(aten.rand_like.default, aten.randn_like.default, aten.new_empty.default, aten.new_zeros.default),
    *(aten.new_ones.default, aten.new_full.default, aten.new_empty_strided.default),
)
def _plain_alike(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    with _disable_current_modes():  # it has no memory, so modes that measure memory must not count it
        alike = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device="meta")
    device = kwargs.pop("device", None)
    return func(alike, *args[1:], **kwargs, device=device or tensor.device)


# All else


def _with_copies(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on bfloat16 copies; what it changes in place is rounded to the grid again."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # inference mode does not decompose such operations by itself
    changed = list(_changed(func, args, kwargs))
    _warn_once(func, bool(changed))
    copies: dict[int, Tensor] = {}
    made = {}

    def dense(one: Any) -> Any:
        if not isinstance(one, GridTensor):
            return one
        if id(one) not in copies:
            copies[id(one)] = one.dequantize()
            made[id(copies[id(one)])] = one
        return copies[id(one)]

    result = func(*tree_map(dense, args), **tree_map(dense, kwargs))
    for tensor in changed:
        tensor.assign(copies[id(tensor)])
    return tree_map(lambda one: made.get(id(one), one), result)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[GridTensor]:
    """Arguments on a grid that the operation writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (one for one in tree_leaves(given) if isinstance(one, GridTensor))


def _warn_once(func: Any, changes: bool) -> None:
    name = func.name()
    if name in _warned:
        return
    _warned.add(name)
    consequence = ""
    if changes:
        consequence = (
            " Its result is rounded to the nearest value on the grid, so small changes are lost: train such weights with one "
            "of sbft's optimizers."
        )
    elif func.is_view:
        consequence = " Its result is a copy: changing it in place does not change the weight."
    warnings.warn(
        f"{name} has no implementation for weights on a grid, so it works on a bfloat16 copy of the weight's values, which "
        f"takes memory.{consequence}",
        stacklevel=2,
    )
