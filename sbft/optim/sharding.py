"""Parameters that are sharded over several processes: the local part of each, and sums over all parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

_AVAILABLE = torch.distributed.is_available()
if _AVAILABLE:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import _StridedShard


Reduce = Callable[[Tensor], object]
"""Replaces a tensor by its sum over some ranks; each of them has to call it."""


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter, which may be empty.

    It has whole slices along the first dimension, which are consecutive elements; or a range of columns of every row; or a
    range of columns of some rows.
    """

    offset: int
    """Global index of its first element."""
    shape: torch.Size
    """Of the whole parameter."""
    all_reduce: Reduce
    """Over the ranks with the other parts."""
    over_columns: Reduce | None = None
    """Over the ranks with other columns of the same rows; None where rows are whole."""
    over_rows: Reduce | None = None
    """Over the ranks with other rows of the same columns; needed only where both rows and columns are split."""

    @property
    def columns_split(self) -> bool:
        """Whether each row is split over several ranks."""
        return self.over_columns is not None

    @property
    def rows_split(self) -> bool:
        """Whether the rows of one matrix are split over several ranks; a stack is split into whole matrices."""
        return len(self.shape) == 2 and (self.over_columns is None or self.over_rows is not None)

    @property
    def count(self) -> int:
        """Number of elements of the whole parameter."""
        return self.shape.numel()

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums of float32 tensors over the ranks, in one message; every rank has to call it with the same shapes."""
        return _summed(self.all_reduce, *parts)

    def sums_of_gradient(self, row_sum: Tensor, column_sum: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of a stack of matrices over its columns, over its rows and in all, completed with those of other ranks."""
        if self.over_columns is not None and self.over_rows is not None:
            (row_sum,) = _summed(self.over_columns, row_sum)
            if self.rows_split:
                (column_sum,) = _summed(self.over_rows, column_sum)
            (total,) = self.sum(total)
        elif self.columns_split:
            row_sum, total = self.sum(row_sum, total)
        elif self.rows_split:
            column_sum, total = self.sum(column_sum, total)
        else:
            (total,) = self.sum(total)
        return row_sum, column_sum, total

    def sum_over_rows(self, total: Tensor) -> Tensor:
        """The sum, for each matrix, over the ranks with other rows of it."""
        if not self.rows_split:
            return total
        return _summed(self.over_rows or self.all_reduce, total)[0]


def _summed(reduce: Reduce, *parts: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if parts[0].device.type == "cpu" else torch.float32
    message = torch.cat([part.reshape(-1).to(dtype) for part in parts])
    reduce(message)
    sums = message.to(torch.float32).split([part.numel() for part in parts])
    return tuple(total.view(part.shape) for total, part in zip(sums, parts, strict=True))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over several processes."""
    return _AVAILABLE and isinstance(tensor, DTensor)


def shard_of(param: Tensor) -> Shard | None:
    """The local part of a parameter; None if it is a plain tensor.

    Raises:
        TypeError: if it is split in another way than along its first dimension, its columns, or both.
    """
    if not is_sharded(param):
        return None
    assert isinstance(param, DTensor)
    cuts = _cuts(param)
    columns = param.ndim - 1 if param.ndim > 1 else None
    begins, sizes = [0] * param.ndim, list(param.shape)
    # The last dimension of the mesh splits first, as tensor parallelism does before FSDP2.
    for mesh_dimension, dimension in reversed(cuts.items()):
        ranks, rank = param.device_mesh.size(mesh_dimension), param.device_mesh.get_local_rank(mesh_dimension)
        size = -(-sizes[dimension] // ranks)
        begin = min(rank * size, sizes[dimension])
        begins[dimension] += begin
        sizes[dimension] = min(size, sizes[dimension] - begin)
    if tuple(sizes) != tuple(param._local_tensor.shape) or not set(cuts.values()) <= {0, columns}:
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is distributed as {param.placements}, its local part of shape "
            f"{tuple(param._local_tensor.shape)}: sbft optimizers update whole tensors and those that are split along "
            "their first dimension, as by FSDP2, their last, as by tensor parallelism, or both"
        )
    offset = sum(begin * math.prod(param.shape[i + 1 :]) for i, begin in enumerate(begins))
    column_cuts = [i for i, dimension in cuts.items() if dimension == columns]
    row_cuts = [i for i in cuts if i not in column_cuts]
    return Shard(
        offset,
        param.shape,
        _reduce_over(param.device_mesh, [*cuts]),
        _reduce_over(param.device_mesh, column_cuts) if column_cuts else None,
        _reduce_over(param.device_mesh, row_cuts) if column_cuts and row_cuts else None,
    )


def _cuts(param: DTensor) -> dict[int, int]:
    """Dimensions of the mesh that split a tensor, each with the dimension of the tensor that it splits."""
    cuts = {}
    for mesh_dimension, placement in enumerate(param.placements):
        if isinstance(placement, ShardPlacement | _StridedShard):
            cuts[mesh_dimension] = placement.dim % param.ndim
        elif not isinstance(placement, Replicate):
            raise TypeError(f"a parameter of shape {tuple(param.shape)} is distributed as {param.placements}")
    return cuts


def _reduce_over(mesh: DeviceMesh, dimensions: list[int]) -> Reduce:
    groups = [mesh.get_group(dimension) for dimension in dimensions]

    def all_reduce(message: Tensor) -> None:
        for group in groups:
            torch.distributed.all_reduce(message, group=group)

    return all_reduce


def parts_of_rows(tensor: Tensor) -> int:
    """Number of parts into which a tensor is split along its first dimension; 1 for a plain one."""
    if not is_sharded(tensor):
        return 1
    assert isinstance(tensor, DTensor)
    return math.prod(tensor.device_mesh.size(i) for i, dimension in _cuts(tensor).items() if dimension == 0)


def cut_by(tensor: Tensor) -> set[str | None]:
    """Names of the mesh dimensions along which ranks have different parts of a tensor, such as "tp"; None if unnamed."""
    if not is_sharded(tensor):
        return set()
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    return {mesh.mesh_dim_names[i] if mesh.mesh_dim_names else None for i in _cuts(tensor) if mesh.size(i) > 1}


def local(tensor: Tensor) -> Tensor:
    """The local part of a tensor; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor  # always the same object, which `to_local` of a parameter does not promise


def differentiable_part(tensor: Tensor) -> Tensor:
    """The local part of a tensor, through which gradients flow to the tensor; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def tensor_parallel_group(tensor: Tensor) -> torch.distributed.ProcessGroup:
    """The ranks over which tensor parallelism alone shards a tensor: they work on the same examples.

    Raises:
        RuntimeError: if it is sharded in another way, as FSDP2 does until a forward needs it.
    """
    assert isinstance(tensor, DTensor)
    if tensor.device_mesh.mesh_dim_names != ("tp",):
        raise RuntimeError(
            f"a weight is sharded as {tensor.placements} over {tensor.device_mesh}; it should be whole, or over a mesh 'tp'"
        )
    return tensor.device_mesh.get_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without gradient. A sharded one is gathered from all ranks, which all have to call this."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.full_tensor()


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, sharded like `example`; each rank takes its part, without communication."""
    if not is_sharded(example) or is_sharded(tensor):
        return tensor
    assert isinstance(example, DTensor)
    parts = distribute_tensor(tensor, example.device_mesh, _side_by_side(example), src_data_rank=None)
    return in_order_of(parts, example)


def in_order_of(tensor: Tensor, example: Tensor) -> Tensor:
    """A sharded tensor with the placements of `example`, for example a gradient with those of its parameter."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor) and isinstance(example, DTensor)
    return tensor if tensor.placements == example.placements else tensor.redistribute(placements=example.placements)


def without_strides(tensor: Tensor) -> Tensor:
    """The same tensor in an order that `torch.distributed.checkpoint` can describe: the ranks' parts side by side.

    Where FSDP2 splits what tensor parallelism has split already, ranks exchange parts; others keep theirs.
    """
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    placements = _side_by_side(tensor)
    return tensor if [*tensor.placements] == placements else tensor.redistribute(placements=placements)


def _side_by_side(tensor: DTensor) -> list[Placement]:
    return [ShardPlacement(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]


def zeros_beside(param: Tensor, dimensions: Sequence[int] | None = None) -> Tensor:
    """Float32 zeros for the state of a parameter, sharded like it.

    Args:
        param: the parameter.
        dimensions: the dimensions that the state shares with it; all, if None.
    """
    kept = [*range(param.ndim)] if dimensions is None else [*dimensions]
    part = local(param)
    zeros = torch.zeros([part.shape[i] for i in kept], dtype=torch.float32, device=part.device)
    if not is_sharded(param):
        return zeros
    assert isinstance(param, DTensor)
    shape = torch.Size(param.shape[i] for i in kept)
    placements: list[Placement] = []
    for placement in param.placements:
        dimension = placement.dim % param.ndim if isinstance(placement, ShardPlacement | _StridedShard) else None
        if dimension not in kept:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(kept.index(dimension), split_factor=placement.split_factor))
        else:
            placements.append(ShardPlacement(kept.index(dimension)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)
