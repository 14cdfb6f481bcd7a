"""Parameters that are spread over several processes: what of one lies here, and sums over all of it."""

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
"""Replaces a tensor by its sum over some ranks; each of these has to ask."""


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter, which may be empty.

    Whole slices along the first dimension, which are consecutive elements; of every row some columns, side by side; or both.
    """

    offset: int
    """Global index of its first element."""
    shape: torch.Size
    """Of the whole parameter."""
    all_reduce: Reduce
    """Over the ranks that hold the other parts."""
    over_columns: Reduce | None = None
    """Over those that hold other columns of the same rows; None where a row is whole."""
    over_rows: Reduce | None = None
    """Over those that hold other rows of the same columns; needed only where rows and columns are both cut."""

    @property
    def columns_split(self) -> bool:
        """Whether a row lies on several ranks."""
        return self.over_columns is not None

    @property
    def rows_split(self) -> bool:
        """Whether the rows of one matrix lie on several ranks; of a stack, whole matrices do."""
        return len(self.shape) == 2 and (self.over_columns is None or self.over_rows is not None)

    @property
    def count(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums of float32 tensors over the ranks, in one message; every rank has to ask for the same shapes."""
        return _summed(self.all_reduce, *parts)

    def sums_of_gradient(self, row_sum: Tensor, column_sum: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a stack of matrices sums up to over its columns, its rows and in all, with what lies on other ranks."""
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
        """The sum of what the ranks with other rows of a matrix have, for each matrix."""
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
    """Whether a tensor is spread over several processes."""
    return _AVAILABLE and isinstance(tensor, DTensor)


def shard_of(param: Tensor) -> Shard | None:
    """What of a parameter lies here; None if it is a plain tensor, all of which does.

    Raises:
        TypeError: if it is cut otherwise than along its first dimension and its columns.
    """
    if not is_sharded(param):
        return None
    assert isinstance(param, DTensor)
    cuts = _cuts(param)
    columns = param.ndim - 1 if param.ndim > 1 else None
    begins, sizes = [0] * param.ndim, list(param.shape)
    # The last dimension of the mesh cuts first, as tensor parallelism does before FSDP2.
    for mesh_dimension, dimension in reversed(cuts.items()):
        ranks, here = param.device_mesh.size(mesh_dimension), param.device_mesh.get_local_rank(mesh_dimension)
        each = -(-sizes[dimension] // ranks)
        begin = min(here * each, sizes[dimension])
        begins[dimension] += begin
        sizes[dimension] = min(each, sizes[dimension] - begin)
    if tuple(sizes) != tuple(param._local_tensor.shape) or not set(cuts.values()) <= {0, columns}:
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is distributed as {param.placements}, its part here of shape "
            f"{tuple(param._local_tensor.shape)}: sbft optimizers update whole tensors and those that are cut along their "
            "first dimension, as FSDP2 does, or their last, as tensor parallelism does, or both"
        )
    offset = sum(begin * math.prod(param.shape[i + 1 :]) for i, begin in enumerate(begins))
    of_columns = [i for i, dimension in cuts.items() if dimension == columns]
    of_rows = [i for i in cuts if i not in of_columns]
    return Shard(
        offset,
        param.shape,
        _reduce_over(param.device_mesh, [*cuts]),
        _reduce_over(param.device_mesh, of_columns) if of_columns else None,
        _reduce_over(param.device_mesh, of_rows) if of_columns and of_rows else None,
    )


def _cuts(param: DTensor) -> dict[int, int]:
    """Dimensions of the mesh by which a tensor is cut, and those of the tensor along which it is."""
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
    """Into how many parts a tensor is cut along its first dimension; 1 of a plain one."""
    if not is_sharded(tensor):
        return 1
    assert isinstance(tensor, DTensor)
    return math.prod(tensor.device_mesh.size(i) for i, dimension in _cuts(tensor).items() if dimension == 0)


def cut_by(tensor: Tensor) -> set[str | None]:
    """Dimensions of the mesh along which ranks have different parts of a tensor, by name, such as "tp"; None has no name."""
    if not is_sharded(tensor):
        return set()
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    return {mesh.mesh_dim_names[i] if mesh.mesh_dim_names else None for i in _cuts(tensor) if mesh.size(i) > 1}


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor  # always the same object, which `to_local` of a parameter does not promise


def differentiable_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, whose gradient becomes the tensor's; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def tensor_parallel_group(tensor: Tensor) -> torch.distributed.ProcessGroup:
    """The ranks that a tensor is spread over by tensor parallelism alone: they work on the same examples.

    Raises:
        RuntimeError: if it is spread otherwise, as FSDP2 does until a forward needs it.
    """
    assert isinstance(tensor, DTensor)
    if tensor.device_mesh.mesh_dim_names != ("tp",):
        raise RuntimeError(
            f"a weight is spread as {tensor.placements} over {tensor.device_mesh}, and was expected whole or over a mesh 'tp'"
        )
    return tensor.device_mesh.get_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all ranks if it is spread over them, which all have to ask for; without gradient."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.full_tensor()


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """All of a tensor, spread over the ranks as `example` is; each rank takes its part, without a message."""
    if not is_sharded(example) or is_sharded(tensor):
        return tensor
    assert isinstance(example, DTensor)
    parts = distribute_tensor(tensor, example.device_mesh, _side_by_side(example), src_data_rank=None)
    return in_order_of(parts, example)


def in_order_of(tensor: Tensor, example: Tensor) -> Tensor:
    """A tensor cut as `example` is, for example a gradient as its parameter."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor) and isinstance(example, DTensor)
    return tensor if tensor.placements == example.placements else tensor.redistribute(placements=example.placements)


def without_strides(tensor: Tensor) -> Tensor:
    """The same tensor in an order that `torch.distributed.checkpoint` can describe: parts of ranks side by side.

    Where FSDP2 cuts once more what tensor parallelism has cut, ranks exchange parts; others keep theirs.
    """
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    placements = _side_by_side(tensor)
    return tensor if [*tensor.placements] == placements else tensor.redistribute(placements=placements)


def _side_by_side(tensor: DTensor) -> list[Placement]:
    return [ShardPlacement(one.dim) if isinstance(one, _StridedShard) else one for one in tensor.placements]


def zeros_beside(param: Tensor, dimensions: Sequence[int] | None = None) -> Tensor:
    """Float32 zeros for the state of a parameter, cut as it is.

    Args:
        param: the parameter.
        dimensions: those of its dimensions that the state has too; None: all.
    """
    kept = [*range(param.ndim)] if dimensions is None else [*dimensions]
    here = local(param)
    zeros = torch.zeros([here.shape[i] for i in kept], dtype=torch.float32, device=here.device)
    if not is_sharded(param):
        return zeros
    assert isinstance(param, DTensor)
    shape = torch.Size(param.shape[i] for i in kept)
    placements: list[Placement] = []
    for one in param.placements:
        dimension = one.dim % param.ndim if isinstance(one, ShardPlacement | _StridedShard) else None
        if dimension not in kept:
            placements.append(Replicate())
        elif isinstance(one, _StridedShard):
            placements.append(_StridedShard(kept.index(dimension), split_factor=one.split_factor))
        else:
            placements.append(ShardPlacement(kept.index(dimension)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)
