"""Counts the tokens that sbft's optimizers need in a plain `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbft.optim.base import TokenOptimizer
from sbft.optim.counting import TokenCount
from sbft.training.arguments import ArgumentError, SmallBatchArguments
from sbft.training.token_optimizers import inner_optimizer


class TokenCountCallback(TrainerCallback):
    """Counts tokens for one of sbft's optimizers in a plain `Trainer`, by `TokenOptimizer.count_tokens`.

    `SmallBatchTrainer` counts tokens itself; the callback then does nothing.

    Examples:
        >>> optimizer = sbft.Adafactor(model.parameters())
        >>> count = sbft.TokenCountCallback()
        >>> Trainer(model, args, collator, dataset, optimizers=(optimizer, None), callbacks=[count]).train()
    """

    def __init__(self) -> None:
        self._count: TokenCount | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start to count.

        Raises:
            ArgumentError: if the optimizer is not from sbft, or releases gradients that the arguments need.
        """
        self._stop()
        if isinstance(args, SmallBatchArguments):
            return
        inner = inner_optimizer(optimizer)
        if not isinstance(inner, TokenOptimizer):
            raise ArgumentError(
                f"TokenCountCallback counts for sbft's optimizers, and this Trainer's is {type(inner).__name__}. Pass one: "
                "optimizers=(sbft.Adafactor(model.parameters()), None); or leave the callback out."
            )
        is_set = {
            "gradient_accumulation_steps": args.gradient_accumulation_steps > 1,
            "max_grad_norm": args.max_grad_norm > 0,
        }
        needing_gradients = [f"{name}={getattr(args, name)}" for name in is_set if is_set[name]]
        if inner.releases_gradients and needing_gradients:
            raise ArgumentError(
                f"{' and '.join(needing_gradients)} would have no effect: the optimizer releases its gradients within "
                "backward. Call remove() on the handle of release_gradients(), or set max_grad_norm=0 and "
                "gradient_accumulation_steps=1."
            )
        assert model is not None
        inner.discard_step()  # an error or an interrupt may have left one half done
        self._count = inner.count_tokens(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        self._stop()

    def _stop(self) -> None:
        if self._count is not None:
            self._count.remove()
        self._count = None
