"""Makes the token optimizer that the arguments name, and gets it back out of accelerate's wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD, TokenOptimizer, matrix_groups
from sbft.optim.matrix import MatrixOptimizer
from sbft.training.arguments import ArgumentError

TOKEN_OPTIMIZERS: dict[str, type[TokenOptimizer]] = {
    "adafactor": Adafactor,
    "adamw": AdamW,
    "sgd": SGD,
    "muon": Muon,
    "sinkgd": SinkGD,
    "row_adafactor": RowAdafactor,
}

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TokenOptimizerCreation(_Base):
    """Put before a `Trainer`: it trains with the token optimizer that the arguments name."""

    args: Any
    model: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The token optimizer that the arguments name, unless one was passed in or they name none.

        Raises:
            ArgumentError: if the optimizer refuses its settings.
        """
        passed = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if passed or self.args.token_optimizer is None:
            return super().create_optimizer(*args, **kwargs)
        model = self.model if not args or args[0] is None else args[0]
        optimizer_class, decay = TOKEN_OPTIMIZERS[self.args.token_optimizer], self.args.weight_decay
        groups = parameter_groups(model, optimizer_class)
        if decay:
            decayed = set(self.get_decay_parameter_names(model))
            groups = with_weight_decay(groups, decay, {p for name, p in model.named_parameters() if name in decayed})
        try:
            self.optimizer = optimizer_class(groups, **self.args.token_optimizer_settings())
        except ValueError as error:
            raise ArgumentError(f"The optimizer {self.args.token_optimizer} cannot be made: {error}.") from error
        return self.optimizer


def parameter_groups(model: nn.Module, optimizer_class: type[TokenOptimizer]) -> list[dict[str, Any]]:
    """A model's trainable parameters: one group, or two if the optimizer treats matrices differently from the rest."""
    if not issubclass(optimizer_class, MatrixOptimizer):
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return matrix_groups(model, () if head is None else head.parameters())


def with_weight_decay(groups: list[dict[str, Any]], decay: float, decayed: set[Tensor]) -> list[dict[str, Any]]:
    """The same groups, each split into the parameters that decay and those that do not; none is empty."""
    split = [
        {**group, "params": [p for p in group["params"] if (p in decayed) == (rate > 0)], "weight_decay": rate}
        for group in groups
        for rate in (decay, 0.0)
    ]
    return [group for group in split if group["params"]]


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper; any other as it is."""
    return getattr(optimizer, "optimizer", optimizer)
