"""Parameter groups of the token optimizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sbft.optim import TokenOptimizer, matrix_groups
from sbft.optim.matrix import MatrixOptimizer


def parameter_groups(model: nn.Module, optimizer_class: type[TokenOptimizer]) -> list[dict[str, Any]]:
    """A model's trainable parameters: one group, or two where the optimizer tells matrices from the rest."""
    if not issubclass(optimizer_class, MatrixOptimizer):
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return matrix_groups(model, () if head is None else head.parameters())


def with_weight_decay(groups: list[dict[str, Any]], decay: float, decayed: set[Tensor]) -> list[dict[str, Any]]:
    """The same groups, each cut into the parameters that decay and those that do not; none is empty."""
    cut = [
        {**group, "params": [p for p in group["params"] if (p in decayed) == (rate > 0)], "weight_decay": rate}
        for group in groups
        for rate in (decay, 0.0)
    ]
    return [group for group in cut if group["params"]]
