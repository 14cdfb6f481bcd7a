"""Settings that every parameter group has: its moving averages, learning rate and weight decay; and what is refused."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbft.tokens import FINE_TUNING_HALF_LIFE

_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


class Average(NamedTuple):
    """Names of the two settings of one moving average, and the decay factor where neither is set.

    `default_beta=None` stands for the fine-tuning half-life.
    """

    half_life: str
    beta: str
    default_beta: float | None = None

    def set_default(self, defaults: dict[str, Any]) -> None:
        """Give an optimizer's defaults a half-life or a decay factor if they have neither."""
        if defaults[self.half_life] is None and defaults[self.beta] is None:
            if self.default_beta is None:
                defaults[self.half_life] = FINE_TUNING_HALF_LIFE
            else:
                defaults[self.beta] = self.default_beta

    def replace_default(self, group: dict[str, Any]) -> None:
        """Let a group that sets one of the pair override the default of the other."""
        if group.get(self.half_life) is not None and group.get(self.beta) is None:
            group.setdefault(self.beta, None)
        elif group.get(self.beta) is not None and group.get(self.half_life) is None:
            group.setdefault(self.half_life, None)


def check_group(group: dict[str, Any], averages: tuple[Average, ...]) -> None:
    """Check the settings that all optimizers have.

    Raises:
        ValueError: if a setting is out of its domain, or an average has both a half-life and a decay factor.
    """
    for name in ("lr", "weight_decay"):
        value = float(group[name])
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]!r}")
    for average in averages:
        _check_average(group, average)


def _check_average(group: dict[str, Any], average: Average) -> None:
    half_life, beta = group[average.half_life], group[average.beta]
    if half_life is not None and beta is not None:
        raise ValueError(
            f"{average.half_life}={half_life!r} (tokens) and {average.beta}={beta!r} (per step) both set the same average: "
            "give one of them"
        )
    if half_life is not None and not (half_life > 0 and math.isfinite(half_life)):
        raise ValueError(f"{average.half_life} must be a positive number of tokens, got {half_life!r}")
    if beta is not None and not 0 <= beta < 1:
        raise ValueError(f"{average.beta} must be at least 0 and less than 1, got {beta!r}")


def check_dtype(param: Tensor) -> None:
    """Check that a parameter can be trained.

    Raises:
        TypeError: if it is neither float32 nor bfloat16.
    """
    if param.dtype == torch.float16:
        raise TypeError(
            "float16 weights cannot be trained without a loss scaler, and their small exponent makes small updates vanish: "
            "convert the model with model.to(torch.bfloat16)"
        )
    if param.dtype not in _SUPPORTED_DTYPES:
        raise TypeError(f"weights must be float32 or bfloat16, got {param.dtype}")
