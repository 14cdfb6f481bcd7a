"""What a trainer needs for tensor parallelism: several ranks share every matrix, and work on the same examples."""

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


class _OnCpus(ParallelismConfig):
    """One that `Accelerator` takes on CPUs too."""

    def _validate_accelerator(self, accelerator: Any) -> None:
        pass


class TensorParallel(_Base):
    """Put before a `Trainer`: weights that tensor parallelism does not cut stay the same on all ranks, and CPUs will do."""

    args: Any
    model: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; accelerate refuses tensor parallelism on CPUs, where nothing stands against it."""
        size = tensor_parallel_size(self.model)
        if size == 1 or self.args.device.type != "cpu" or self.args.parallelism_config is not None:
            super().create_accelerator_and_postprocess()
            return
        others = self.args.world_size // size
        self.args.parallelism_config = _OnCpus(tp_size=size, dp_shard_size=others)
        try:
            super().create_accelerator_and_postprocess()
        finally:
            self.args.parallelism_config = None  # it holds process groups, and the arguments are saved

    def _replicated(self) -> list[Tensor]:
        """Trained weights of which all ranks that share the matrices have the same, such as those of norms."""
        if self.get_tp_size() == 1:
            return []
        return [one for one in self.model.parameters() if one.requires_grad and "tp" not in cut_by(one)]

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """As in `Trainer`, but for its hooks: where ranks share the matrices, `_agree_on_replicated` stands for them."""
        if self.get_tp_size() == 1:
            super()._sync_replicated_trainable_parameters(model)
        for parameter in self._replicated():
            torch.distributed.broadcast(local(parameter.detach()), group=self._sharing_ranks(), group_src=0)

    def _agree_on_replicated(self) -> None:
        """Ranks compute the gradients of replicated weights alike, but on some devices not to the last bit: take the mean."""
        gradients = [local(one.grad) for one in self._replicated() if one.grad is not None]
        if not gradients:
            return
        message = torch.cat([one.reshape(-1).float() for one in gradients])
        torch.distributed.all_reduce(message, group=self._sharing_ranks())
        message /= self.get_tp_size()
        for gradient, mean in zip(gradients, message.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def _sharing_ranks(self) -> torch.distributed.ProcessGroup:
        """Those that share every matrix with this one, as `from_pretrained` has put them together."""
        group: torch.distributed.ProcessGroup = self.model._device_mesh["tp"].get_group()
        return group


def tensor_parallel_size(model: nn.Module) -> int:
    """How many processes share every matrix of a model, as `from_pretrained` was told."""
    if not isinstance(model, PreTrainedModel) or model._tp_size is None:
        return 1
    return int(model._tp_size)
