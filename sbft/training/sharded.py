"""Checkpoints of a model that is sharded over processes: whole tensors, from which any number of processes can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sbft.errors import ModelError
from sbft.optim.base import TokenOptimizer
from sbft.optim.sharding import local, shard_of
from sbft.training.head import shard_again


def save_states(optimizer: TokenOptimizer, scheduler: Any, folder: Path, *, main: bool) -> None:
    """Write the states of optimizer and scheduler as the trainer does of a model in one process; every rank has to ask."""
    state = optimizer.whole_state_dict(keep=main)
    if main:
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Read every rank's part of a model's weights from the safetensors files of a checkpoint.

    Raises:
        ModelError: if the files lack a weight.
    """
    shard_again(model)
    lacking = dict(model.named_parameters())
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in lacking.keys() & set(file.keys()):
                _load(lacking.pop(name), file.get_slice(name))
    if lacking:
        raise ModelError(
            f"The checkpoint {folder} lacks {len(lacking)} of the model's weights, the first {min(lacking)}."
        )


def _load(parameter: Tensor, stored: Any) -> None:
    here = local(parameter)
    shard = shard_of(parameter)
    if shard is None:
        here.copy_(stored[:])
    elif here.numel():
        begin = shard.offset // shard.shape[1:].numel()
        here.copy_(stored[begin : begin + here.shape[0]])
