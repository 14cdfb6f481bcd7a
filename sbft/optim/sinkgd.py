"""SinkGD: gradients whose rows and columns are scaled to the same size, without state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbft.optim.matrix import MatrixOptimizer


class SinkGD(MatrixOptimizer):
    """SinkGD (Scetbon et al., arXiv 2502.06742, algorithms 3 and 4) for matrices, Adafactor for the rest.

    The rows and the columns of a matrix's gradient are scaled in turn, until each has a root mean square of one; `lr` is then
    the root mean square of the step. There is no state.

    As in the paper's experiments (section 5), embeddings, output head and vectors have an adaptive optimizer with a rate of
    their own, 20 times that of matrices. In the paper it is Adam. Here it is Adafactor (without a relative step), which has
    less state, unless `rest_optimizer` is "adamw".

    Args:
        params: parameters or groups, float32 or bfloat16; `sbft.optim.matrix_groups` splits a model's. Those in groups
            with `matrices=False`, and all that are neither matrices nor stacks of them, are the rest.
        lr: learning rate of matrices.
        sinkhorn_iterations: how often rows and columns are scaled. The paper's experiments use 5.
        rest_optimizer: updates the rest: "adafactor" or "adamw".
        rest_lr_ratio: learning rate of the rest, as a multiple of `lr`.
        beta1: fixed decay factor per step of AdamW's first moment. Default: 0.9.
        first_moment_half_life: its half-life in tokens instead.
        second_moment_half_life: half-life in tokens of the rest's second moment. Default: 221,000, which is beta2 = 0.95 at
            16 x 1024 tokens.
        beta2: its fixed decay factor per step instead.
        eps: of the rest's optimizer. Default: 1e-8 for AdamW, 1e-30 for Adafactor.
        weight_decay: decoupled: a weight shrinks by its rate times `weight_decay` per step.
        stochastic_rounding: round bfloat16 weights stochastically instead of to nearest.
        seed: of the rounding noise.

    Raises:
        ValueError: if a setting is out of its domain, both a half-life and a decay factor are given, or a matrix is sharded
            over several processes.
        TypeError: for weights that are neither float32 nor bfloat16.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        sinkhorn_iterations: int = 5,
        rest_optimizer: str = "adafactor",
        rest_lr_ratio: float = 20.0,
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
            "sinkhorn_iterations": sinkhorn_iterations,
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
        if group["sinkhorn_iterations"] != int(group["sinkhorn_iterations"]) or group["sinkhorn_iterations"] < 1:
            raise ValueError(
                f"sinkhorn_iterations must be a positive whole number, got {group['sinkhorn_iterations']!r}"
            )

    def _direction(self, grad: Tensor, momentum: Tensor | None, usable: Tensor, group: dict[str, Any]) -> Tensor:
        return balanced_(grad, group["sinkhorn_iterations"])

    def _rate_ratio(self, group: dict[str, Any], rows: int, columns: int) -> float:
        return 1.0


def balanced_(matrix: Tensor, iterations: int) -> Tensor:
    """Scale rows, then columns, to a root mean square of one, several times; rows and columns of zeros stay.

    The iterations update only the factors of rows and columns, as in Sinkhorn's algorithm on the squared matrix. That matrix
    is made in blocks of rows, anew in each iteration, or once where a single block holds it.

    Args:
        matrix: (R, C) float32, changed in place.
        iterations: number of iterations.
    """
    rows, columns = matrix.shape
    height = max(_BLOCK // columns, 1)
    blocks = matrix.split(height)
    for begin in range(0, iterations, _AT_ONCE):
        # First make the largest value of every row and column one, or the squares of tiny ones would vanish beside others.
        # The scale of a row makes no difference; that of a column is where its factor starts.
        for block in blocks:
            block.div_(_or_one(block.abs().amax(1, keepdim=True)))
        column_factors = _or_one(torch.stack([block.abs().amax(0) for block in blocks]).amax(0))
        matrix.div_(column_factors)
        column_factors.square_()  # the iterations work on squared factors
        row_factors = matrix.new_empty(rows)
        whole = matrix.square() if len(blocks) == 1 else None
        for _ in range(begin, min(begin + _AT_ONCE, iterations)):
            sums = torch.zeros_like(column_factors)
            for block, factors in zip(blocks, row_factors.split(height), strict=True):
                squares = block.square() if whole is None else whole
                factors.copy_(_inverse(torch.mv(squares, column_factors), columns))
                sums.addmv_(squares.t(), factors)
            column_factors = _inverse(sums, rows)
        matrix.mul_(row_factors.sqrt_()[:, None]).mul_(column_factors.sqrt_())
    return matrix


_BLOCK = 1 << 24
"""Number of elements in a block."""

_AT_ONCE = 5
"""Iterations before the matrix itself is scaled. In each, a squared factor changes by up to the number of rows or columns. With
a million of these, the factors of more iterations would overflow float32."""


def _or_one(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest, 1.0)


def _inverse(sums: Tensor, count: int) -> Tensor:
    return torch.where(sums == 0, 0.0, count / sums)
