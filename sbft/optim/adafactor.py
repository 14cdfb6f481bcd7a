"""Adafactor with averages measured in tokens: its state takes a few thousandths of the memory of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sbft.optim.base import TokenOptimizer
from sbft.optim.group_settings import Average
from sbft.optim.kernels import sliced
from sbft.optim.kernels.blocks import version_of
from sbft.optim.sharding import is_sharded, zeros_beside
from sbft.optim.update import Update
from sbft.optim.vocabulary import SlicedGradient

FACTORED_FROM = 128
SECOND_MOMENT = Average("second_moment_half_life", "beta2")
_CLASSIC_EXPONENT = 0.8


class Adafactor(TokenOptimizer):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) without momentum, its second moment held constant in tokens.

    The second moment, in float32, is factored over a parameter's last two dimensions if both are at least
    `min_dim_size_to_factor` (separately for each index of the leading dimensions), else it has one number per element.
    optax factors over the two largest dimensions instead, which differs for tensors of three and more. The
    update is scaled down until its RMS over the whole tensor is at most `clip_threshold`. With `relative_step` it is
    multiplied by the weight's RMS (at least 1e-3), so that `lr` is the relative change of a weight in one step: start near
    1e-4.

    Args:
        params: parameters or groups, float32 or bfloat16.
        lr: learning rate.
        second_moment_half_life: number of tokens after which the weight of a squared gradient has halved. Default: 221,000,
            which is beta2 = 0.95 at 16 x 1024 tokens.
        beta2: fixed decay factor per step instead; with `schedule="power"` the exponent (default 0.8).
        schedule: "half_life" for a constant average with bias correction, or "power" for Adafactor's own decay factor
            `1 - step ** -beta2`, which needs none.
        relative_step: scale the step by the weight's RMS.
        clip_threshold: largest RMS of an update before scaling.
        eps: added to the squared gradient.
        min_dim_size_to_factor: smallest of the last two dimensions at which the second moment is factored.
        weight_decay: decoupled: a weight shrinks by `lr * weight_decay` per step.
        stochastic_rounding: round bfloat16 weights stochastically instead of to nearest.
        seed: of the rounding noise.

    Raises:
        ValueError: if a setting is out of its domain, or both a half-life and a decay factor are given.
        TypeError: for weights that are neither float32 nor bfloat16.
    """

    averages = (SECOND_MOMENT,)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        second_moment_half_life: float | None = None,
        beta2: float | None = None,
        schedule: str = "half_life",
        relative_step: bool = True,
        clip_threshold: float = 1.0,
        eps: float = 1e-30,
        min_dim_size_to_factor: int = FACTORED_FROM,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if schedule == "power" and beta2 is None and second_moment_half_life is None:
            beta2 = _CLASSIC_EXPONENT
        defaults = {
            "lr": lr,
            "second_moment_half_life": second_moment_half_life,
            "beta2": beta2,
            "schedule": schedule,
            "relative_step": relative_step,
            "clip_threshold": clip_threshold,
            "eps": eps,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, seed)

    def _start_transient(self) -> None:
        super()._start_transient()
        # Sum of squares of each weight after its last update, and the weight's version then: saves a read per step.
        self._weight_square_sums: dict[Tensor, tuple[tuple[int, int], Any]] = {}

    def _validate(self, group: dict[str, Any]) -> None:
        if group["schedule"] not in ("half_life", "power"):
            raise ValueError(f"schedule must be 'half_life' or 'power', got {group['schedule']!r}")
        if group["schedule"] == "power" and group["second_moment_half_life"] is not None:
            raise ValueError(
                "schedule='power' has no half-life: drop second_moment_half_life, and give beta2 as the exponent if not 0.8"
            )
        for name in ("clip_threshold", "eps"):
            if not (group[name] > 0 and math.isfinite(group[name])):
                raise ValueError(f"{name} must be a positive, finite number, got {group[name]!r}")
        smallest = group["min_dim_size_to_factor"]
        if not (isinstance(smallest, int) and smallest >= 1):
            raise ValueError(f"min_dim_size_to_factor must be an integer of at least 1, got {smallest!r}")

    def varies_by_step(self, group: dict[str, Any]) -> bool:
        return bool(group["schedule"] == "power")

    def _second_moment_weight(self, group: dict[str, Any]) -> float | Tensor:
        if group["schedule"] == "half_life":
            return self._weight(group, SECOND_MOMENT)
        return (self.clock.steps + 1.0) ** -group["beta2"]

    def takes_slices(self, param: Tensor) -> bool:
        """Whether the second moment of a matrix is factored, so that sums over its gradient are all that is kept."""
        if param not in self._positions or self._captured or param.ndim != 2 or is_sharded(param):
            return False
        state = self.state.get(param)
        group = self.param_groups[self._positions[param][0]]
        return "row" in state if state else is_factored(param, group.get("min_dim_size_to_factor", FACTORED_FROM))

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        # State dicts that were saved before the setting existed have none.
        init_factored_moment(param, state, group.get("min_dim_size_to_factor", FACTORED_FROM))

    def _update(self, update: Update) -> float | Tensor:
        param, group = update.param, update.group
        version, square_sum = self._weight_square_sums.get(param, ((0, 0), None))
        known = square_sum if version == version_of(param) else None
        grad_square_sum, square_sum = update_with_factored_moment(
            update,
            known,
            average_weight=self._second_moment_weight(group),
            lr=self._rate(group),
            relative_step=group["relative_step"],
            clip_threshold=group["clip_threshold"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        if self._captured and isinstance(known, Tensor) and isinstance(square_sum, Tensor):
            square_sum = known.copy_(square_sum)  # a captured update reads it at this address
        self._weight_square_sums[param] = (version_of(param), square_sum)
        return grad_square_sum


def is_factored(param: Tensor, smallest: int = FACTORED_FROM) -> bool:
    """Whether a parameter's second moment is factored: none of its last two dimensions is below `smallest`."""
    return param.ndim >= 2 and min(param.shape[-2:]) >= smallest


def init_factored_moment(param: Tensor, state: dict[str, Tensor], smallest: int = FACTORED_FROM) -> None:
    """Put Adafactor's state of a parameter into an empty `state`; not factored where a dimension is below `smallest`."""
    if state:
        return
    if is_factored(param, smallest):
        state["row"] = zeros_beside(param, range(param.ndim - 1))
        # Where the rows (or columns) that one of them sums over are on several ranks, each of these has the whole average.
        state["column"] = zeros_beside(param, [*range(param.ndim - 2), param.ndim - 1])
    else:
        state["second_moment"] = zeros_beside(param)
    state["mass"] = torch.zeros((), dtype=torch.float32, device=param.device)


def update_with_factored_moment(
    update: Update, weight_square_sum: float | Tensor | None, **settings: Any
) -> tuple[float | Tensor, float | Tensor | None]:
    """Adafactor's update of one parameter by the kernel of its device.

    Args:
        update: its state is that of `init_factored_moment`.
        weight_square_sum: sum of the squared weights as they are now, if known.
        settings: of `kernels.reference.adafactor_factored`, but for `key` and `shard`.

    Returns:
        Sum of the squared gradient; and of the squared new weights, for a relative step.
    """
    param, grad, _, state, key, shard, kernels = update
    square_sums: tuple[float | Tensor, float | Tensor | None]
    if isinstance(grad, SlicedGradient):
        square_sums = sliced.adafactor_factored(
            param, grad, state["row"], state["column"], state["mass"], weight_square_sum, kernels=kernels, key=key, **settings
        )  # fmt: skip
    elif "row" in state:
        square_sums = kernels.adafactor_factored(
            param, grad, state["row"], state["column"], state["mass"], weight_square_sum, key=key, shard=shard, **settings
        )  # fmt: skip
    else:
        square_sums = kernels.adafactor_full(
            param, grad, state["second_moment"], state["mass"], weight_square_sum, key=key, shard=shard, **settings
        )
    return square_sums
