"""Several processes of one run: how long they wait for each other, what they agree on, and how the loss of one is noticed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from sbft.errors import TrainingError

# gloo raises plain RuntimeErrors; each of them mentions this.
_GLOO = "gloo/"
# The default of transformers. A shorter timeout would expire while one rank writes a large checkpoint to a slow disk.
DEFAULT_TIMEOUT_S = 1800


def join_on_cpu(timeout_s: float) -> None:
    """Join the other processes, if the environment names any; each wait for them ends after `timeout_s` seconds.

    transformers passes its `ddp_timeout` on only for GPUs; on a CPU torch would use its own half an hour.
    """
    has_rank = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if has_rank and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def loss_of_a_rank(error: BaseException, timeout_s: float) -> str | None:
    """What to tell the user if this error means that another process is lost; None if it means something else.

    Args:
        error: what was raised.
        timeout_s: how long a process waits for the others, the recipe's `training.ddp_timeout`.
    """
    message = str(error)
    from_gloo = isinstance(error, RuntimeError) and _GLOO in message
    if not from_gloo and not isinstance(error, torch.distributed.DistError):
        return None
    here = f"Process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
    if "timed out" in message.lower() or "timeout" in message.lower():
        return (
            f"{here} has waited {timeout_s:.0f} s for the others in vain (training.ddp_timeout): one of them, or the network, "
            "hangs. If one has work that takes longer, such as a checkpoint on a slow disk, raise the timeout: --set "
            f"training.ddp_timeout={2 * timeout_s:.0f}."
        )
    return (
        f"{here} has lost the connection to another, which has ended, crashed, or cannot be reached any more. The "
        "launcher of the processes says which one, and why."
    )


def check_agreed(checkpoint: Path | None) -> None:
    """Check that all processes would resume from the same checkpoint. Every process must call this.

    Raises:
        TrainingError: in all of them, if they differ.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    own = "none" if checkpoint is None else checkpoint.name
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, own)
    if len(set(names)) > 1:
        listed = ", ".join(f"process {rank} {name}" for rank, name in enumerate(names))
        raise TrainingError(
            f"The processes would resume from different checkpoints: {listed}. Each has looked into its own output_dir and "
            "skipped damaged checkpoints: put output_dir on a disk that all nodes share, or copy one node's to the others."
        )
