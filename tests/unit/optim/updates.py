"""One update of each kind, from a state that is not zero, with any module of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ADAFACTOR = {
    "average_weight": 0.3, "lr": 1e-2, "relative_step": True, "clip_threshold": 1.0, "eps": 1e-30, "weight_decay": 0.1,
}  # fmt: skip
ADAMW = {"first_weight": 0.1, "second_weight": 0.02, "lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
SGD = {"momentum_weight": 0.2, "lr": 1e-2, "weight_decay": 0.1}


def update(backend: Any, rule: str, weight: Any, grad: Tensor, key: Any, **changed: Any) -> dict[str, Tensor]:
    """Runs one update in place.

    Args:
        backend: a module of kernels.
        rule: factored, full, adamw, adamw-no-momentum, sgd or sgd-momentum.
        weight: the weight to update; its state is created on the gradient's device.
        grad: its gradient.
        key: key of the noise, or None.
        **changed: settings other than those above.

    Returns:
        The state, and what the update returned.
    """

    def filled(shape: Any) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(5)).to(grad.device) + 0.1

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, device=grad.device)

    shape, changed = weight.shape, {**changed, "key": key}
    state = {"mass": scalar(0.7), "second_mass": scalar(0.4)}
    sums: Any
    if rule == "factored":
        state |= {"row": filled(shape[:-1]), "column": filled(shape[:-2] + shape[-1:])}
        arguments = (state["row"], state["column"], state["mass"], None)
        sums = backend.adafactor_factored(weight, grad, *arguments, **{**ADAFACTOR, **changed})
    elif rule == "full":
        state["v"] = filled(shape)
        sums = backend.adafactor_full(weight, grad, state["v"], state["mass"], None, **{**ADAFACTOR, **changed})
    elif rule.startswith("adamw"):
        state |= {"m": filled(shape), "v": filled(shape)}
        moments = (state["m"] if rule == "adamw" else None, state["v"], state["mass"], state["second_mass"])
        sums = (backend.adamw(weight, grad, *moments, **{**ADAMW, **changed}),)
    else:
        state["m"] = filled(shape)
        momentum = (state["m"], state["mass"]) if rule == "sgd-momentum" else (None, None)
        sums = (backend.sgd(weight, grad, *momentum, **{**SGD, **changed}),)
    return state | {f"sum {i}": torch.as_tensor(float(each)) for i, each in enumerate(sums) if each is not None}
