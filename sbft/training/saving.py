"""How a trainer writes its checkpoints, and a run its model: whole, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from sbft.errors import TrainingError
from sbft.optim.sharding import is_sharded
from sbft.training.checkpoints import (
    INCOMPLETE,
    MARK,
    PREFIX,
    damage,
    describe_damage,
    find_checkpoint,
    publish,
    remove_leftovers,
    rotate,
    seal,
    size_bytes,
    sound_checkpoint,
    sync,
)
from sbft.training.disk import writing

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class WholeCheckpoints(_Base):
    """Put before a `Trainer`: each of its checkpoints gets its name when all of it is on the disk."""

    args: Any
    _writing = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; with `resume_from_checkpoint=True`, damaged checkpoints are passed over with a warning."""
        if resume_from_checkpoint is True:
            checkpoint, damaged = sound_checkpoint(Path(str(self.args.output_dir)))
            if checkpoint is not None:
                resume_from_checkpoint = str(checkpoint)
                if damaged:
                    logger.warning(describe_damage(damaged, checkpoint))
            elif sealed := {path: why for path, why in damaged.items() if (path / MARK).is_file()}:
                newest, reason = next(iter(sealed.items()))
                raise TrainingError(
                    f"No checkpoint in {newest.parent} is sound ({newest.name}: {reason}), so there is nothing to resume. "
                    "Train without resume_from_checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """As in `Trainer`: where checkpoints are written and, once they are, removed."""
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, INCOMPLETE) if self._writing else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in `Trainer`, but under a temporary name until all files are on the disk."""
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        written = folder / INCOMPLETE / f"{PREFIX}{step}"
        former = find_checkpoint(folder)
        needed = None if former is None else size_bytes(Path(former))
        main: bool = self.args.should_save
        with writing(f"The checkpoint of step {step}", folder, takes_bytes=needed):
            try:
                if main:
                    remove_leftovers(folder)
                self._wait_for_all()
                with self._elsewhere():
                    super()._save_checkpoint(model, trial)
                self._note_if_best(written, folder)
                self._wait_for_all()
                if main:
                    seal(written)
                    newest = publish(written, folder)
                    best = self.state.best_model_checkpoint
                    limit: int | None = self.args.save_total_limit
                    rotate(folder, newest, limit=limit, best=None if best is None else Path(best))
            finally:
                # Half a checkpoint is of no use, and takes the room that the next needs.
                if main:
                    remove_leftovers(folder)
        self._wait_for_all()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / written.name))

    def _note_if_best(self, written: Path, folder: Path) -> None:
        """The trainer has noted where the best checkpoint lies before this one has its name."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, once the checkpoint has its name: it is uploaded while training goes on."""
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        """As in `Trainer`, if the checkpoint is as it was written.

        Raises:
            TrainingError: if it is not.
        """
        best = Path(str(self.state.best_model_checkpoint))
        reason = damage(best) if (best / MARK).is_file() else None
        if reason is not None:
            raise TrainingError(
                f"The best checkpoint, {best}, cannot be taken for the trained model: {reason}. To keep the model as the "
                "last step leaves it, type the command again with --resume --set training.load_best_model_at_end=false."
            )
        model: Any = self.model
        if any(is_sharded(parameter) for parameter in model.parameters()):
            self._load_from_checkpoint(str(best))  # the trainer's way cannot fill sharded weights
        else:
            super()._load_best_model()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, which would also remove the newest checkpoint where only one is kept and another is best."""
        with self._elsewhere():
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """The trainer beneath sees the folder of unfinished checkpoints, and no other checkpoint in it."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """A folder to write a model into, whose files come into `folder`, each in one piece, when all are on the disk.

    Raises:
        DiskError: if the disk refuses; what is in `folder` stays as it is.
    """
    written = folder / INCOMPLETE / "model"
    with writing("The trained model", folder):
        try:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
            yield written
            for path in written.rglob("*"):
                sync(path)
            for path in written.iterdir():
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            sync(folder)
        finally:
            remove_leftovers(folder)
