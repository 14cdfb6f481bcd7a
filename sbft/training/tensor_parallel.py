"""Tensor parallelism: several ranks share every matrix and work on the same examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from accelerate import ParallelismConfig  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from sbft.optim.sharding import cut_by, local

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class _CpuParallelismConfig(ParallelismConfig):
    """A config that `Accelerator` also accepts on CPUs."""

    def _validate_accelerator(self, accelerator: Any) -> None:
        pass


class TensorParallel(_Base):
    """Put before a `Trainer`: weights that tensor parallelism does not shard are the same on all ranks, on CPUs too."""

    args: Any
    model: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, but also on CPUs, where accelerate refuses tensor parallelism although it works."""
        size = tensor_parallel_size(self.model)
        if size == 1 or self.args.device.type != "cpu" or self.args.parallelism_config is not None:
            super().create_accelerator_and_postprocess()
            return
        replicas = self.args.world_size // size
        self.args.parallelism_config = _CpuParallelismConfig(tp_size=size, dp_shard_size=replicas)
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.parallelism_config = None  # it holds process groups, and the arguments are saved

    def _replicated(self) -> list[Tensor]:
        """Trained weights that are whole on each of the ranks that share the matrices, such as those of norms."""
        if self.get_tp_size() == 1:
            return []
        return [weight for weight in self.model.parameters() if weight.requires_grad and "tp" not in cut_by(weight)]

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """As in `Trainer`; if ranks share the matrices, without its hooks, in whose place `_agree_on_replicated` is called."""
        if self.get_tp_size() == 1:
            super()._sync_replicated_trainable_parameters(model)
        for parameter in self._replicated():
            torch.distributed.broadcast(local(parameter.detach()), group=self._sharing_ranks(), group_src=0)

    def _agree_on_replicated(self) -> None:
        """Take the mean of the gradients of replicated weights, which on some devices differ between ranks in the last bits."""
        gradients = [local(weight.grad) for weight in self._replicated() if weight.grad is not None]
        if not gradients:
            return
        message = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        torch.distributed.all_reduce(message, group=self._sharing_ranks())
        message /= self.get_tp_size()
        means = message.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def _sharing_ranks(self) -> torch.distributed.ProcessGroup:
        """The ranks that share every matrix with this one, a group that `from_pretrained` made."""
        group: torch.distributed.ProcessGroup = self.model._device_mesh["tp"].get_group()
        return group


def tensor_parallel_size(model: nn.Module) -> int:
    """How many processes share every matrix of a model."""
    if not isinstance(model, PreTrainedModel) or model._tp_size is None:
        return 1
    return int(model._tp_size)
