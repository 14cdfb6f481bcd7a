"""Checkpoints of a run: which of them are whole, and where to go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MARK = "complete.json"


class MarkComplete(TrainerCallback):
    """Writes the sizes of a checkpoint's files into it as the very last act.

    The trainer writes straight into `checkpoint-N`, so a folder of this name may have been cut off at any file.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every file of the checkpoint is written, by this rank at least."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if args.should_save:
            mark_complete(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def mark_complete(checkpoint: Path) -> None:
    """Write down the sizes, in bytes, of all files of a checkpoint."""
    part = checkpoint / f"{MARK}.part"
    part.write_text(json.dumps(_sizes(checkpoint), indent=2) + "\n", encoding="utf-8")
    os.replace(part, checkpoint / MARK)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there in its full size."""
    try:
        noted = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    sizes = _sizes(checkpoint)
    return isinstance(noted, dict) and all(sizes.get(name) == size for name, size in noted.items())


def find_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in the folder of a run; None if it has none."""
    return next((str(checkpoint) for checkpoint in _newest_first(folder) if is_complete(checkpoint)), None)


def cut_off_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints newer than the newest complete one, the newest first."""
    cut_off = []
    for checkpoint in _newest_first(folder):
        if is_complete(checkpoint):
            break
        cut_off.append(checkpoint)
    return cut_off


def _newest_first(folder: Path) -> list[Path]:
    """Folders named `checkpoint-N`, by N."""
    if not folder.is_dir():
        return []
    steps = {
        path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir()
    }
    found = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (MARK, f"{MARK}.part")
    }
