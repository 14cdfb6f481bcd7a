"""Gradient release: each parameter is updated within backward, and its gradient freed before the next one exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sbft.optim.sharding import is_sharded


class ParameterUpdater(Protocol):
    """What gradient release needs of an optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def has_waiting(self) -> bool:
        """Whether updates wait for their launch."""

    def release_parameter(self, param: Tensor) -> None:
        """Update one parameter from its gradient, as a part of the open step; the update may wait."""

    def launch_waiting(self) -> None:
        """Launch the updates that wait."""


class GradientRelease:
    """Hooks that hand every complete gradient to the optimizer; made by `TokenOptimizer.release_gradients()`.

    A tied parameter is updated once, after all its uses have contributed. Parameters that are frozen, or that get no
    gradient in a step, stay as they are. Settings of the groups are read when a hook runs, so schedulers and
    `load_state_dict` work after attaching. Parameters in `held` are left to `step()`; they may be plain tensors even where
    several processes train.

    Updates that wait for a common launch are launched at the end of backward, at the latest. After a backward that failed,
    `step()`, `discard_step()` or `remove()` launches them.

    Attributes:
        is_attached: whether gradients are released; false after `remove()`.
        around_last_launch: entered around the launch at the end of backward, for example to measure its time.
    """

    def __init__(self, optimizer: ParameterUpdater, held: Iterable[Tensor] = ()) -> None:
        self._optimizer = optimizer
        self._held = set(held)
        released = {param for group in optimizer.param_groups for param in group["params"]} - self._held
        _refuse_replicas(released)
        self.is_attached = True
        self.around_last_launch: Callable[[], AbstractContextManager[None]] = nullcontext
        self._handles: list[RemovableHandle] = []
        for group in optimizer.param_groups:
            self.attach(group["params"])

    def attach(self, params: Iterable[Tensor]) -> None:
        """Release these parameters too (`add_param_group` calls this)."""
        for param in params:
            if param.requires_grad and param not in self._held:
                self._handles.append(param.register_post_accumulate_grad_hook(self._on_gradient))

    def _on_gradient(self, param: Tensor) -> None:
        waited = self._optimizer.has_waiting
        try:
            self._optimizer.release_parameter(param)
        finally:  # even if the update failed, or the next backward would add to this gradient
            param.grad = None
        if self._optimizer.has_waiting and not waited:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        with self.around_last_launch():
            self._optimizer.launch_waiting()

    def remove(self) -> None:
        """Take the hooks off; from the next backward on `step()` updates all parameters. May be called again."""
        self._optimizer.launch_waiting()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.is_attached = False

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _refuse_replicas(params: Iterable[Tensor]) -> None:
    """FSDP2 reduces a sharded parameter's gradient before its hooks run; DDP does so after those of a plain one."""
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and not all(is_sharded(param) for param in params):
        raise RuntimeError(
            "gradient release with several processes would update each replica from its own gradient, before "
            "DistributedDataParallel averages them: shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), train in "
            "one process, or without release_gradients()."
        )
