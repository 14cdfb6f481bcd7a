"""Parameters that are spread over several processes: what of one lies here, and sums over all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, zeros
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: consecutive elements, whole slices along the first dimension; it may be empty."""

    offset: int
    """Global index of its first element."""
    shape: torch.Size
    """Of the whole parameter."""
    all_reduce: Callable[[Tensor], object]
    """Replaces a tensor by its sum over the ranks that hold the other parts."""

    @property
    def rows_split(self) -> bool:
        """Whether the rows of one matrix lie on several ranks; of a stack, whole matrices do."""
        return len(self.shape) == 2

    @property
    def count(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums of float32 tensors over the ranks, in one message; every rank has to ask for the same shapes."""
        dtype = torch.float64 if parts[0].device.type == "cpu" else torch.float32
        message = torch.cat([part.reshape(-1).to(dtype) for part in parts])
        self.all_reduce(message)
        sums = message.to(torch.float32).split([part.numel() for part in parts])
        return tuple(total.view(part.shape) for total, part in zip(sums, parts, strict=True))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over several processes."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def shard_of(param: Tensor) -> Shard | None:
    """What of a parameter lies here; None if it is a plain tensor, all of which does.

    Raises:
        TypeError: if it is cut otherwise than along its first dimension.
    """
    if not is_sharded(param):
        return None
    assert isinstance(param, DTensor)
    mesh, cut = param.device_mesh, []
    for dimension, placement in enumerate(param.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not ShardPlacement or placement.dim != 0:
            raise TypeError(
                f"a parameter of shape {tuple(param.shape)} is distributed as {param.placements}: sbft optimizers "
                "update whole tensors and those that are cut along their first dimension, as FSDP2 does"
            )
        cut.append(mesh.get_group(dimension))
    _, start = compute_local_shape_and_global_offset(param.shape, mesh, param.placements)

    def all_reduce(message: Tensor) -> None:
        for group in cut:
            torch.distributed.all_reduce(message, group=group)

    return Shard(start[0] * math.prod(param.shape[1:]), param.shape, all_reduce)


def is_cut_evenly(tensor: Tensor) -> bool:
    """Whether every rank has as much of a tensor as the others; true of a plain one."""
    if not is_sharded(tensor):
        return True
    assert isinstance(tensor, DTensor)
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    parts = math.prod(size for placement, size in sizes if isinstance(placement, ShardPlacement))
    return tensor.shape[0] % parts == 0


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor  # always the same object, which `to_local` of a parameter does not promise


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
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def zeros_beside(param: Tensor, shape: torch.Size, *, cut: bool = True) -> Tensor:
    """Float32 zeros for the state of a parameter.

    Args:
        param: the parameter.
        shape: of the whole.
        cut: whether its first dimension is the parameter's own, and is cut as that is; else every rank has all of it.
    """
    if not is_sharded(param):
        return torch.zeros(shape, dtype=torch.float32, device=param.device)
    assert isinstance(param, DTensor)
    placements = param.placements if cut else [Replicate()] * param.device_mesh.ndim
    return zeros(shape, dtype=torch.float32, device_mesh=param.device_mesh, placements=placements)
