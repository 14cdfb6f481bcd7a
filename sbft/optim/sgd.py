"""Stochastic gradient descent, without momentum or with an average measured in tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbft.optim.base import TokenOptimizer
from sbft.optim.group_settings import Average
from sbft.optim.kernels import sliced
from sbft.optim.sharding import is_sharded, zeros_beside
from sbft.optim.update import Update
from sbft.optim.vocabulary import SlicedGradient

_MOMENTUM = Average("momentum_half_life", "momentum", default_beta=0.0)


class SGD(TokenOptimizer):
    """Stochastic gradient descent; without momentum it keeps no state at all (arXiv 2507.07101, section 4.2).

    Momentum is a bias-corrected moving average of the gradient, float32 of the parameter's shape, so `lr` means the same with
    and without it. (`torch.optim.SGD` adds gradients up instead: its rate is smaller by one minus the momentum.)

    Args:
        params: parameters or groups, float32 or bfloat16.
        lr: learning rate.
        momentum: fixed decay factor of the gradient's average per step. Default: 0, no momentum.
        momentum_half_life: its half-life in tokens instead.
        weight_decay: decoupled: a weight shrinks by `lr * weight_decay` per step.
        stochastic_rounding: round bfloat16 weights stochastically instead of to nearest.
        seed: of the rounding noise.

    Raises:
        ValueError: if a setting is out of its domain, or both a half-life and a decay factor are given.
        TypeError: for weights that are neither float32 nor bfloat16.
    """

    averages = (_MOMENTUM,)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        momentum: float | None = None,
        momentum_half_life: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_half_life": momentum_half_life,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, seed)

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if not state and self._is_kept(group, _MOMENTUM):
            state["momentum"] = zeros_beside(param)
            state["mass"] = torch.zeros((), dtype=torch.float32, device=param.device)

    def takes_slices(self, param: Tensor) -> bool:
        """Whether a matrix is trained without momentum, which would be as large as its gradient."""
        if param not in self._positions or self._captured or param.ndim != 2 or is_sharded(param):
            return False
        return not self._is_kept(self.param_groups[self._positions[param][0]], _MOMENTUM)

    def _update(self, update: Update) -> float | Tensor:
        param, grad, group, state, key, shard, kernels = update
        if isinstance(grad, SlicedGradient):
            settings = {"lr": self._rate(group), "weight_decay": group["weight_decay"], "key": key}
            return sliced.sgd(param, grad, kernels=kernels, **settings)
        grad_square_sum: float | Tensor = kernels.sgd(
            param,
            grad,
            state.get("momentum"),
            state.get("mass"),
            momentum_weight=self._weight(group, _MOMENTUM),
            lr=self._rate(group),
            weight_decay=group["weight_decay"],
            key=key,
            shard=shard,
        )
        return grad_square_sum
