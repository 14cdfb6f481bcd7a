"""The trainer's part of offloading: the model is not moved to the device, but streamed through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sbft.recipe.offload import offload_of
from sbft.training.arguments import ArgumentError
from sbft.training.offload import link
from sbft.training.offload.streamed import StreamedModel

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class OffloadedLayers(_Base):
    """Put before whatever runs a model's forward and backward: layers that `offload` names are in the host's memory.

    Attributes:
        streamed: the model whose layers are streamed; None if none are.
    """

    args: Any
    model: Any
    _attached: contextlib.ExitStack
    streamed: StreamedModel | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; accelerate must not move the model either."""
        super().create_accelerator_and_postprocess()
        if self.args.offload is not None:
            self.accelerator.device_placement = False

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """As in `Trainer`, unless the model is to be streamed, which begins once its weights are what they are stored in."""
        if self.args.offload is None:
            super()._move_model_to_device(model, device)

    def _stream_layers(self, model: nn.Module) -> None:
        """Begin to stream the layers of a model, in the place of those of any model before.

        Raises:
            ArgumentError: if several processes train it.
            OffloadError: if this machine's device or memory does not do.
            ModelError: if the model's layers cannot be found.
        """
        offload = offload_of(self.args.offload)
        if offload is None:
            return
        if self.args.world_size > 1:
            raise ArgumentError(
                f"offload={self.args.offload!r} works in one process, and there are {self.args.world_size}. Start one, or "
                "leave offload out."
            )
        self.stop_offloading()
        self.streamed = StreamedModel(
            model, offload, link.link_to(self.args.device), releases=self.args.releases_gradients
        )

    def stop_offloading(self) -> None:
        """Have the whole model in the host's memory, with plain parameters and without hooks."""
        if self.streamed is not None:
            self.streamed.remove()
            self.streamed = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; afterwards all streamed weights are in the host's memory, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._settle()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; after backward all streamed weights are in the host's memory."""
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
            return loss
        finally:
            self._settle()

    def _settle(self) -> None:
        if self.streamed is not None:
            self.streamed.settle()

    def _hook_streamed(self, hook: Callable[[Tensor], None]) -> None:
        """Register a hook on every streamed parameter that is trained, for the time of this training."""
        assert self.streamed is not None
        for parameter in self.streamed.parameters:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(hook)
                self._attached.callback(handle.remove)
