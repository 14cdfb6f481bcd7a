"""Running a model's forward on the side: hooks, modes, random state and sharding are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sbft.optim.sharding import is_sharded

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

# Elements. Larger buffers, such as masks and tables of positions, are constants, and copying them would cost memory.
_SMALL_BUFFER = 2**16


@contextmanager
def left_as_it_was(model: nn.Module, training: bool) -> Iterator[None]:
    """Around forwards in training or evaluation mode.

    Afterwards the mode of every module, the random state, small buffers such as counters, and FSDP2's sharding are restored.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (buffer, buffer.clone())
        for buffer in model.buffers()
        if buffer.numel() <= _SMALL_BUFFER and not is_sharded(buffer)
    ]
    devices = accelerators_of(model)
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        shard_again(model)


@contextmanager
def pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """Calls `hook` before each forward of `module` within the block."""
    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def shard_again(model: nn.Module) -> None:
    """Put the sharded weights back. After a forward without a backward, FSDP2 keeps some whole weights in their place."""
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def accelerators_of(model: nn.Module) -> list[torch.device]:
    """The devices of a model's parameters, other than the CPU."""
    return [*{parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}]
