"""The base class of optimizers of whole matrices: which parameters are matrices, and AdamW or Adafactor for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sbft.optim.adafactor import init_factored_moment, update_with_factored_moment
from sbft.optim.adamw import FIRST_MOMENT, SECOND_MOMENT, init_moments, update_with_moments
from sbft.optim.base import TokenOptimizer
from sbft.optim.group_settings import Average
from sbft.optim.kernels.blocks import matrices
from sbft.optim.sharding import Shard, is_sharded
from sbft.optim.update import Update

REST_OPTIMIZERS = ("adamw", "adafactor")
_REST_EPS = {"adamw": 1e-8, "adafactor": 1e-30}
_REST_CLIP_THRESHOLD = 1.0
_MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)  # of the parameters that are no matrices
_NOT_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def matrix_groups(model: nn.Module, rest: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    """Parameter groups of a model for an optimizer of matrices: the matrices, and the rest.

    An embedding holds one vector per token, and a convolution a stack of small kernels: neither is a matrix here. By custom
    the output head is none either (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).

    Args:
        model: its trainable parameters are split.
        rest: further parameters that are not updated as matrices: the output head's weight, unless it is also the input
            embedding.

    Returns:
        One or two groups, none of them empty.
    """
    not_matrices = set(rest)
    for module in model.modules():
        if isinstance(module, _NOT_MATRICES):
            not_matrices.update(module.parameters(recurse=False))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter not in not_matrices], "matrices": True},
        {"params": [parameter for parameter in trainable if parameter in not_matrices], "matrices": False},
    ]
    return [group for group in groups if group["params"]]


class MatrixOptimizer(TokenOptimizer):
    """An optimizer that turns the gradient of a whole matrix into a direction.

    In a group with `matrices=True`, the default, parameters with two dimensions are matrices and those with three are stacks
    of them, updated one by one. All others, and the groups with `matrices=False`, are the rest. AdamW updates them, or
    Adafactor without a relative step, so that the rate means the same.

    A subclass implements `_direction` and `_rate_ratio`.
    """

    averages: ClassVar[tuple[Average, ...]] = _MOMENTS

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int) -> None:
        if defaults["rest_optimizer"] == "adafactor":
            unused = [name for name in ("beta1", "first_moment_half_life") if defaults[name] is not None]
            if unused:
                raise ValueError(
                    f"{unused[0]} has no effect, because rest_optimizer='adafactor' keeps no first moment: leave it out, or "
                    "take rest_optimizer='adamw'"
                )
        super().__init__(params, {**defaults, "matrices": True}, seed)

    def _validate(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group["rest_optimizer"] not in REST_OPTIMIZERS:
            raise ValueError(f"rest_optimizer must be one of {REST_OPTIMIZERS}, got {group['rest_optimizer']!r}")
        for setting in ("rest_lr_ratio", "eps"):
            value = group[setting]
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{setting} must be a positive, finite number, got {value!r}")
        for param in group["params"]:
            if is_sharded(param) and _is_matrix(param, group):
                raise ValueError(
                    f"{name} works on whole matrices, and one of shape {tuple(param.shape)} is sharded over several "
                    "processes: train in one process, or take Adafactor, AdamW or SGD"
                )

    def _is_used(self, group: dict[str, Any], average: Average) -> bool:
        return average not in _MOMENTS or not all(_is_matrix(param, group) for param in group["params"])

    # The rule of matrices

    def _direction(self, grad: Tensor, momentum: Tensor | None, usable: Tensor, group: dict[str, Any]) -> Tensor:
        """The direction that a step subtracts from a matrix, before it is scaled by the rate.

        Args:
            grad: float32 (R, C); may be changed in place.
            momentum: float32 (R, C) if `_has_momentum`, else None; changed in place unless `usable` is false.
            usable: whether the parameter's whole gradient is finite, bool of shape (); if it is not, `grad` is NaN.
            group: the settings.

        Returns:
            (R, C), any dtype and strides.
        """
        raise NotImplementedError  # abstract

    def _rate_ratio(self, group: dict[str, Any], rows: int, columns: int) -> float:
        """The learning rate of a matrix of this shape, as a multiple of the group's."""
        raise NotImplementedError  # abstract

    def _has_momentum(self, group: dict[str, Any]) -> bool:
        """Whether the state of a matrix has a momentum, float32 of the parameter's shape."""
        return False

    # Updates

    def _init_state(self, param: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if _is_matrix(param, group):
            if self._has_momentum(group) and "momentum" not in state:
                state["momentum"] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        elif group["rest_optimizer"] == "adamw":
            init_moments(param, state, has_first=self._is_kept(group, FIRST_MOMENT))
        else:
            init_factored_moment(param, state)

    def _update(self, update: Update) -> float | Tensor:
        group = update.group
        if _is_matrix(update.param, group):
            return self._update_matrices(update)
        settings = {
            "lr": self._rate(group) * group["rest_lr_ratio"],
            "eps": group["eps"] or _REST_EPS[group["rest_optimizer"]],
            "weight_decay": group["weight_decay"],
        }
        second_weight = self._weight(group, SECOND_MOMENT)
        if group["rest_optimizer"] == "adamw":
            first_weight = self._weight(group, FIRST_MOMENT)
            return update_with_moments(update, first_weight=first_weight, second_weight=second_weight, **settings)
        settings |= {"relative_step": False, "clip_threshold": _REST_CLIP_THRESHOLD}
        return update_with_factored_moment(update, None, average_weight=second_weight, **settings)[0]

    def _update_matrices(self, update: Update) -> Tensor:
        param, grad, group = update.param, update.grad, update.group
        assert isinstance(grad, Tensor)  # it takes no slices
        weights, grads = matrices(param), matrices(grad)
        total = torch.stack([_square_sum(matrix) for matrix in grads]).sum().float()
        usable = total.isfinite()  # stays on the device, so that the host does not wait for a GPU
        ratio = self._rate_ratio(group, *weights.shape[1:])
        for i, direction in enumerate(self.directions(param, grad, usable)):
            update.kernels.sgd(
                weights[i],
                direction,
                None,
                None,
                momentum_weight=1.0,
                lr=self._rate(group) * ratio,
                weight_decay=group["weight_decay"] / ratio,  # the kernel's is a multiple of its rate
                key=update.key,
                shard=None if len(weights) == 1 else whole_part(param.shape, i * weights[i].numel()),
            )
        return total

    def directions(self, param: Tensor, grad: Tensor, usable: Tensor) -> Iterator[Tensor]:
        """The directions of a parameter's matrices, one by one; updates the momentum with the gradient.

        Args:
            param: a parameter of this optimizer.
            grad: its gradient, of the same shape.
            usable: whether all of `grad` is finite, bool of shape (); if not, the directions are NaN, and the kernels leave the
                weight as it is.

        Yields:
            (R, C) in the weight's dtype, which the kernels expect of a gradient.
        """
        group, momentum = self.param_groups[self._positions[param][0]], self.state[param].get("momentum")
        if not _is_matrix(param, group):
            return
        for i, matrix in enumerate(matrices(grad)):
            average = None if momentum is None else matrices(momentum)[i]
            yield self._direction(torch.where(usable, matrix, torch.nan).float(), average, usable, group).to(
                param.dtype
            )


def _square_sum(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32).square().sum(dtype=torch.float64)


def _is_matrix(param: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["matrices"]) and param.ndim in (2, 3) and min(param.shape[-2:]) > 1


def whole_part(shape: torch.Size, offset: int) -> Shard:
    """A part of a plain parameter that is updated on its own, with the noise that its elements have in the whole."""
    return Shard(offset, shape, lambda message: None)
