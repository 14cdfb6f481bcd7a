"""Adapters on a model that is sharded over several processes: their weights are kept the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from sbft.optim.sharding import is_sharded

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ReplicatedAdapters(_Base):
    """Put before a `Trainer`: trained weights that FSDP2 has not sharded are the same on all ranks, on CPUs too."""

    args: Any
    _averaging: Sequence[RemovableHandle] = ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the hooks on the model are removed however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._remove_hooks()

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """As in `Trainer`, but the mean of the gradients is a sum divided by the ranks, because gloo has no mean."""
        self._remove_hooks()
        replicated = [weight for weight in model.parameters() if weight.requires_grad and not is_sharded(weight)]
        for parameter in replicated:
            torch.distributed.broadcast(parameter.detach(), src=0)
        self._averaging = [weight.register_post_accumulate_grad_hook(self._average) for weight in replicated]

    def _remove_hooks(self) -> None:
        for handle in self._averaging:
            handle.remove()

    def _average(self, parameter: Tensor) -> None:
        """Average a gradient over the ranks when the last micro-batch of the step is in it."""
        if parameter.grad is not None and self.accelerator.sync_gradients:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.args.world_size
