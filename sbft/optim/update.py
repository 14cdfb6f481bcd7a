"""The arguments of one update, and the results that the updates of a step leave on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sbft.optim.sharding import Shard
from sbft.optim.vocabulary import SlicedGradient
from sbft.rounding import Key


class Update(NamedTuple):
    """One update of one parameter.

    A named tuple: every parameter gets a new one in every step, and a frozen dataclass takes longer to make.

    Attributes:
        param: the weight, changed in place. Of a sharded parameter, this and all other tensors are the local parts.
        grad: its gradient, of the same shape, with any strides; or in slices, if the optimizer takes those for it.
        group: settings of its parameter group.
        state: its state by name, float32, changed in place.
        key: noise key if the weight is rounded stochastically, else None.
        shard: which part of the parameter `param` is; None for a plain tensor.
        kernels: the module whose functions update a weight on its device, or what stands in for it; see `sbft.optim.kernels`.
    """

    param: Tensor
    grad: Tensor | SlicedGradient
    group: dict[str, Any]
    state: dict[str, Tensor]
    key: Key | None
    shard: Shard | None
    kernels: Any


class OpenStep(NamedTuple):
    """Results of the updates of a step, until `step()` closes it.

    Attributes:
        updated: the parameters that were updated.
        square_sums: sum of the squared gradient of each, in the order of the updates.
    """

    updated: set[Tensor]
    square_sums: list[float | Tensor]
