"""What a trainer needs for an adapter on a model that is sharded over several processes: it is the same on all of them."""

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
    """Put before a `Trainer`: trained weights that FSDP2 has not sharded stay the same on all ranks, on CPUs too."""

    args: Any
    _averaging: Sequence[RemovableHandle] = ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the hooks on the model are taken off however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leave_gradients()

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """As in `Trainer`, but the mean of gradients is a sum that is divided: gloo knows no other."""
        self._leave_gradients()
        replicated = [one for one in model.parameters() if one.requires_grad and not is_sharded(one)]
        for parameter in replicated:
            torch.distributed.broadcast(parameter.detach(), src=0)
        self._averaging = [one.register_post_accumulate_grad_hook(self._average) for one in replicated]

    def _leave_gradients(self) -> None:
        for handle in self._averaging:
            handle.remove()

    def _average(self, parameter: Tensor) -> None:
        """Once the micro-batches of a step have added up."""
        if parameter.grad is not None and self.accelerator.sync_gradients:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.args.world_size
