"""Adafactor with one second moment per row of a matrix: about half the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sbft.grid.tensor import GridTensor
from sbft.optim.adafactor import Adafactor
from sbft.optim.kernels.blocks import average_, matrices
from sbft.optim.kernels.reference import step_size
from sbft.optim.matrix import whole_part
from sbft.optim.sharding import zeros_beside
from sbft.optim.update import Update

_PIECE_ELEMENTS = 1 << 20


class RowAdafactor(Adafactor):
    """Adafactor whose second moment has one number per row of a matrix, that is, per output neuron.

    Adam-mini (Zhang et al., arXiv 2406.16793, section 2) shows that one second moment serves all weights of an output neuron
    as well as one per weight, because the Hessian is nearly block-diagonal with one block per neuron. Adafactor's column
    factor adds the scale of the inputs, which the norms before a transformer's matrices have mostly evened out.

    All else, including the settings, is as in `Adafactor`. Vectors have one second moment per element, and
    `min_dim_size_to_factor` has no effect.
    """

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if param.ndim < 2:
            super()._init_state(param, group, state)
        elif not state:
            state["row"] = zeros_beside(param, range(param.ndim - 1))
            state["mass"] = torch.zeros((), dtype=torch.float32, device=param.device)

    def takes_slices(self, param: Tensor) -> bool:
        return False

    def _update(self, update: Update) -> float | Tensor:
        param, grad, group, state, key, shard, kernels = update
        if param.ndim < 2:
            return super()._update(update)
        if shard is not None and shard.columns_split:
            raise TypeError(
                f"RowAdafactor works on whole rows, and tensor parallelism has split those of a parameter of shape "
                f"{tuple(shard.shape)} over several processes: use Adafactor, or shard the model with FSDP2"
            )
        assert isinstance(grad, Tensor)  # it takes no slices
        row, mass = state["row"], state["mass"]
        w, g = matrices(param), matrices(grad)
        row_sum = torch.zeros(g.shape[:-1], dtype=torch.float32, device=param.device)
        weight_sum = torch.zeros((), dtype=torch.float32, device=param.device)
        for piece in _pieces(g.shape):
            row_sum[piece] = _square_sums(g[piece])
            weight_sum += _square_sums(w[piece]).sum()
        row_sum, total = row_sum.view(row.shape), row_sum.sum()
        if shard is not None:
            total, weight_sum = shard.sum(total, weight_sum)
        usable = total.isfinite()  # stays on the device, so that the host does not wait for a GPU
        average_weight = self._second_moment_weight(group)
        average_(row, torch.where(usable, row_sum / grad.shape[-1] + group["eps"], row), average_weight)
        average_(mass, torch.where(usable, 1.0, mass), average_weight)
        second_moment = row / mass
        update_sum = (row_sum / second_moment).sum()
        if shard is not None:
            (update_sum,) = shard.sum(update_sum)
        lr, shape = self._rate(group), param.shape if shard is None else shard.shape
        step = step_size(lr, group["relative_step"], group["clip_threshold"], shape.numel(), update_sum, weight_sum)
        # The kernel leaves the weight as it is if a direction is not finite.
        factor = torch.where(usable, step * second_moment.rsqrt(), torch.nan).view(g.shape[:-1])
        offset = 0 if shard is None else shard.offset
        rate = 1.0 if isinstance(lr, float) else torch.ones_like(lr)  # the factor includes it
        for piece in _pieces(g.shape):
            direction = g[piece].float() * factor[piece].unsqueeze(-1)
            kernels.sgd(
                w[piece],
                direction.to(param.dtype),  # which the kernels expect of a gradient
                None,
                None,
                momentum_weight=1.0,
                lr=rate,
                weight_decay=lr * group["weight_decay"],
                key=key,
                shard=whole_part(shape, offset),
            )
            offset += direction.numel()
        return total


def _pieces(shape: torch.Size) -> Iterator[tuple[int, slice]]:
    """Cut a (B, R, C) shape into runs of rows, in order, each small enough to copy."""
    stack, rows, columns = shape
    step = max(1, _PIECE_ELEMENTS // columns)
    for b in range(stack):
        for first in range(0, rows, step):
            yield b, slice(first, min(first + step, rows))


def _square_sums(rows: Tensor) -> Tensor:
    rows = rows.dequantize(torch.float32) if isinstance(rows, GridTensor) else rows
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_()
