"""AdamW with averages measured in tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sbft.optim.base import TokenOptimizer
from sbft.optim.group_settings import Average
from sbft.optim.sharding import zeros_beside
from sbft.optim.update import Update

FIRST_MOMENT = Average("first_moment_half_life", "beta1", default_beta=0.9)
SECOND_MOMENT = Average("second_moment_half_life", "beta2")


class AdamW(TokenOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose second moment is held constant in tokens.

    The paper scales beta2 alone and leaves beta1 at 0.9 for all batch sizes (arXiv 2507.07101, section 3.2); so do the
    defaults here. Both moments are float32 of the parameter's shape; with `beta1=0` the first is not kept at all.

    Args:
        params: parameters or groups, float32 or bfloat16.
        lr: learning rate.
        beta1: fixed decay factor of the first moment per step. Default: 0.9.
        first_moment_half_life: its half-life in tokens instead.
        second_moment_half_life: half-life of the second moment in tokens. Default: 221,000, which is beta2 = 0.95 at
            16 x 1024 tokens.
        beta2: its fixed decay factor per step instead.
        eps: added to the root of the second moment.
        weight_decay: decoupled: a weight shrinks by `lr * weight_decay` per step.
        stochastic_rounding: round bfloat16 weights stochastically instead of to nearest.
        seed: of the rounding noise.

    Raises:
        ValueError: if a setting is out of its domain, or both a half-life and a decay factor are given.
        TypeError: for weights that are neither float32 nor bfloat16.
    """

    averages = (FIRST_MOMENT, SECOND_MOMENT)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        beta1: float | None = None,
        first_moment_half_life: float | None = None,
        second_moment_half_life: float | None = None,
        beta2: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "first_moment_half_life": first_moment_half_life,
            "second_moment_half_life": second_moment_half_life,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, seed)

    def _validate(self, group: dict[str, Any]) -> None:
        if not (group["eps"] > 0 and math.isfinite(group["eps"])):
            raise ValueError(f"eps must be a positive, finite number, got {group['eps']!r}")

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        init_moments(param, state, has_first=self._is_kept(group, FIRST_MOMENT))

    def _update(self, update: Update) -> float | Tensor:
        group = update.group
        return update_with_moments(
            update,
            first_weight=self._weight(group, FIRST_MOMENT),
            second_weight=self._weight(group, SECOND_MOMENT),
            lr=self._rate(group),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def init_moments(param: Tensor, state: dict[str, Tensor], *, has_first: bool) -> None:
    """Put the parts of AdamW's state that are missing into `state`."""
    if not state:
        state["second_moment"] = zeros_beside(param)
        state["first_mass"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["second_mass"] = torch.zeros((), dtype=torch.float32, device=param.device)
    if has_first and "first_moment" not in state:
        state["first_moment"] = zeros_beside(param)
        state["first_mass"].zero_()


def update_with_moments(update: Update, **settings: Any) -> float | Tensor:
    """AdamW's update of one parameter by the kernel of its device.

    Args:
        update: its state is that of `init_moments`.
        settings: of `kernels.reference.adamw`, but for `key` and `shard`.

    Returns:
        Sum of the squared gradient.
    """
    param, grad, _, state, key, shard, kernels = update
    grad_square_sum: float | Tensor = kernels.adamw(
        param,
        grad,
        state.get("first_moment"),
        state["second_moment"],
        state["first_mass"],
        state["second_mass"],
        key=key,
        shard=shard,
        **settings,
    )
    return grad_square_sum
