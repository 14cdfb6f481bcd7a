"""Several processes of one run: how long they wait for one another, what they agree on, and how it shows that one is lost."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from sbft.errors import TrainingError

# What gloo, whose errors are plain ones, names in each of them.
_GLOO = "gloo/"
# Of transformers' TrainingArguments. A shorter one would strike while one rank writes a large checkpoint to a slow disk.
DEFAULT_TIMEOUT_S = 1800


def join_on_cpu(timeout_s: float) -> None:
    """Join the other processes that the environment names, if it does, and wait for them at most so long at a time.

    transformers hands its `ddp_timeout` on for GPUs alone; on a CPU torch's half an hour would hold.
    """
    named = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if named and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def loss_of_a_rank(error: BaseException, timeout_s: float) -> str | None:
    """Sentences on the process that this one has waited for in vain; None if the error says nothing of the kind.

    Args:
        error: what was raised.
        timeout_s: how long a process waits for the others, the recipe's `training.ddp_timeout`.
    """
    said = str(error)
    from_gloo = isinstance(error, RuntimeError) and _GLOO in said
    if not from_gloo and not isinstance(error, torch.distributed.DistError):
        return None
    here = f"Process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
    if "timed out" in said.lower() or "timeout" in said.lower():
        return (
            f"{here} has waited {timeout_s:.0f} s for the others in vain (training.ddp_timeout): one of them hangs, or the "
            "network to it does. If one has work that takes longer, such as a checkpoint on a slow disk, raise it: --set "
            f"training.ddp_timeout={2 * timeout_s:.0f}."
        )
    return (
        f"{here} has lost the connection to another, which has ended, crashed, or cannot be reached any more. What started "
        "the processes says which, and why."
    )


def check_agreed(checkpoint: Path | None) -> None:
    """Compare the checkpoint that each process would go on from; every one has to ask.

    Raises:
        TrainingError: in all of them, if one would take another than the rest.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    own = "none" if checkpoint is None else checkpoint.name
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    if len(set(found)) > 1:
        listed = ", ".join(f"process {rank} {name}" for rank, name in enumerate(found))
        raise TrainingError(
            f"The processes would go on from different checkpoints: {listed}. Each has looked into its own output_dir and "
            "passed over what it found damaged: put it on a disk that all nodes share, or copy one node's to the others."
        )
