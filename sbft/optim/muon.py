"""Muon with averages measured in tokens; without momentum, spectral descent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sbft.optim.adamw import FIRST_MOMENT, SECOND_MOMENT
from sbft.optim.group_settings import Average
from sbft.optim.matrix import MatrixOptimizer

_MOMENTUM = Average("momentum_half_life", "momentum", default_beta=0.95)
# Of K. Jordan's quintic iteration: steepest at zero, so that small singular values grow fastest.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ADJUSTMENTS = ("original", "match_rms_adamw")


class Muon(MatrixOptimizer):
    """Muon (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) for matrices, AdamW for the rest.

    The step of a matrix is the gradient's average, made approximately orthonormal in rows or columns by five Newton-Schulz
    iterations. With a fixed `momentum` all is as in `torch.optim.Muon`. The average is float32 of the parameter's shape. With
    `momentum=0` there is none: this is steepest descent under the spectral norm, which has no state (J. Bernstein and
    L. Newhouse, arXiv 2409.20325, section 3).

    Args:
        params: parameters or groups, float32 or bfloat16; `sbft.optim.matrix_groups` splits a model's. Those in groups
            with `matrices=False`, and all that are neither matrices nor stacks of them, are the rest.
        lr: learning rate.
        momentum: fixed decay factor of the gradient's average per step. Default: 0.95.
        momentum_half_life: its half-life in tokens instead.
        nesterov: mix the gradient into the average once more, with the weight that it has in the average.
        adjust_lr_fn: factor of `lr` for an A x B matrix: "original" for sqrt(max(1, A / B)), or "match_rms_adamw" for
            0.2 * sqrt(max(A, B)), with which rate and weight decay mean about the same as for AdamW (Liu et al.,
            arXiv 2502.16982, section 2.2).
        newton_schulz_dtype: "bfloat16", or "float32" for four to ten times the time on most devices.
        rest_optimizer: updates the rest: "adamw", or "adafactor" (without a relative step) for less state.
        rest_lr_ratio: learning rate of the rest, as a multiple of `lr`.
        beta1: fixed decay factor per step of AdamW's first moment. Default: 0.9.
        first_moment_half_life: its half-life in tokens instead.
        second_moment_half_life: half-life in tokens of the rest's second moment. Default: 221,000, which is beta2 = 0.95 at
            16 x 1024 tokens.
        beta2: its fixed decay factor per step instead.
        eps: of the rest's optimizer. Default: 1e-8 for AdamW, 1e-30 for Adafactor.
        weight_decay: decoupled: a matrix shrinks by `lr * weight_decay` per step, the rest by its own rate times that.
        stochastic_rounding: round bfloat16 weights stochastically instead of to nearest.
        seed: of the rounding noise.

    Raises:
        ValueError: if a setting is out of its domain, both a half-life and a decay factor are given, or a matrix is sharded
            over several processes.
        TypeError: for weights that are neither float32 nor bfloat16.
    """

    averages = (_MOMENTUM, FIRST_MOMENT, SECOND_MOMENT)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float | None = None,
        momentum_half_life: float | None = None,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        newton_schulz_dtype: str = "bfloat16",
        rest_optimizer: str = "adamw",
        rest_lr_ratio: float = 1.0,
        beta1: float | None = None,
        first_moment_half_life: float | None = None,
        second_moment_half_life: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_half_life": momentum_half_life,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "newton_schulz_dtype": newton_schulz_dtype,
            "rest_optimizer": rest_optimizer,
            "rest_lr_ratio": rest_lr_ratio,
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
        super()._validate(group)
        for name, allowed in (("adjust_lr_fn", _ADJUSTMENTS), ("newton_schulz_dtype", tuple(_DTYPES))):
            if group[name] not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        return self._is_kept(group, _MOMENTUM)

    def _direction(self, grad: Tensor, momentum: Tensor | None, usable: Tensor, group: dict[str, Any]) -> Tensor:
        if momentum is not None:
            weight = self._weight(group, _MOMENTUM)
            rest = 1.0 - weight
            if isinstance(weight, Tensor):
                weight, rest = weight.float(), (1.0 - weight).float()
            # Not bias-corrected, as in torch: the iteration does not depend on the average's size.
            momentum.lerp_(torch.where(usable, grad, momentum), weight)
            grad = grad.lerp_(momentum, rest) if group["nesterov"] else torch.where(usable, momentum, grad)
        return orthogonalized(grad.to(_DTYPES[group["newton_schulz_dtype"]]))

    def _rate_ratio(self, group: dict[str, Any], rows: int, columns: int) -> float:
        if group["adjust_lr_fn"] == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximately the nearest matrix with orthonormal rows or columns: singular values become 0.7 to 1.2.

    Newton-Schulz iterations in the matrix's own dtype. Singular values below about a hundredth of the Frobenius norm stay
    smaller; a matrix of zeros stays one.

    Args:
        matrix: (R, C).

    Returns:
        A new tensor of the same shape and dtype, transposed in memory if it has more rows than columns.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
