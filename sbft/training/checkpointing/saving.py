"""Writes checkpoints of a trainer, and the model of a run, completely or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from sbft.errors import TrainingError
from sbft.files import sync
from sbft.training.checkpointing.checkpoints import (
    INCOMPLETE,
    MARK,
    PREFIX,
    damage,
    describe_damage,
    files_of,
    find_checkpoint,
    note,
    publish,
    remove_leftovers,
    rotate,
    seal,
    size_bytes,
    sound_checkpoint,
)
from sbft.training.checkpointing.disk_errors import writing

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class WholeCheckpoints(_Base):
    """Put before a `Trainer`: a checkpoint gets its name when all of it is on the disk."""

    args: Any
    _writing = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; with `resume_from_checkpoint=True`, damaged checkpoints are skipped with a warning.

        Raises:
            TrainingError: if all checkpoints are damaged.
        """
        if resume_from_checkpoint is True:
            checkpoint, damaged = sound_checkpoint(Path(str(self.args.output_dir)), self._damage)
            if checkpoint is not None:
                resume_from_checkpoint = str(checkpoint)
                if damaged:
                    logger.warning(describe_damage(damaged, checkpoint))
            elif sealed := {path: reason for path, reason in damaged.items() if (path / MARK).is_file()}:
                newest, reason = next(iter(sealed.items()))
                raise TrainingError(
                    f"Every checkpoint in {newest.parent} is damaged ({newest.name}: {reason}), so there is nothing to resume. "
                    "Train without resume_from_checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """As in `Trainer`: the folder in which checkpoints are written and removed."""
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, INCOMPLETE) if self._writing else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As in `Trainer`, but under a temporary name until all files are on the disk.

        Raises:
            DiskError: if the disk refuses to write it.
            TrainingError: if the processes do not share the folder.
        """
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        written = folder / INCOMPLETE / f"{PREFIX}{step}"
        previous = find_checkpoint(folder)
        needed = None if previous is None else size_bytes(Path(previous))
        with writing(f"The checkpoint of step {step}", folder, takes_bytes=needed):
            try:
                self._on_main(lambda: remove_leftovers(folder))
                with self._in_incomplete():
                    super()._save_checkpoint(model, trial)
                self._note_if_best(written, folder)
                self._seal(written)
                self._on_main(lambda: self._publish(written, folder))
            finally:
                # An incomplete checkpoint is useless, and takes the space that the next one needs.
                if self.args.should_save:
                    remove_leftovers(folder)
        self._wait_for_all()
        if self.args.push_to_hub:
            self._together(lambda: self._push_from_checkpoint(str(folder / written.name)))

    def _seal(self, written: Path) -> None:
        """Each rank notes the files that it has written, and the first seals the checkpoint with all of them."""
        if self.args.save_on_each_node:
            self._wait_for_all()
            self._on_main(lambda: seal(written))
            return
        rank = self.args.process_index
        parts = self._together(lambda: note(written, files_of(written, rank if self.args.world_size > 1 else None)))
        noted = {name: of_file for part in parts for name, of_file in sorted(part.items())}
        missing = self._on_main(lambda: next((name for name in noted if not (written / name).is_file()), None))
        if missing is not None:
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} lacks {missing} in {written.parent}, where process 0 writes: "
                "the processes do not share this folder. Choose an --output-dir on a file system that all of them share."
            )
        self._on_main(lambda: seal(written, noted))

    def _publish(self, written: Path, folder: Path) -> None:
        newest = publish(written, folder)
        best = self.state.best_model_checkpoint
        limit: int | None = self.args.save_total_limit
        rotate(folder, newest, limit=limit, best=None if best is None else Path(best))

    def _note_if_best(self, written: Path, folder: Path) -> None:
        """Correct the path of the best checkpoint, which `Trainer` has noted before this one got its name."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, after the checkpoint got its name: it is uploaded while training continues."""
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        """As in `Trainer`.

        Raises:
            TrainingError: if the checkpoint is damaged.
        """
        best = Path(str(self.state.best_model_checkpoint))
        reason = self._damage(best) if (best / MARK).is_file() else None
        if reason is not None:
            raise TrainingError(
                f"The best checkpoint, {best}, cannot be loaded as the trained model: {reason}. To keep the model of the last "
                "step instead, run the command again with --resume --set training.load_best_model_at_end=false."
            )
        super()._load_best_model()

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint. The ranks divide its files among them, and all get the same answer."""
        share = (self.args.process_index, self.args.world_size)
        return next((reason for reason in self._together(lambda: damage(checkpoint, share=share)) if reason), None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, which would also remove the newest checkpoint if only one is kept and another is the best."""
        with self._in_incomplete():
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def _in_incomplete(self) -> Iterator[None]:
        """Let `Trainer` write to the folder of incomplete checkpoints, where it finds no other checkpoint to remove."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _on_main(self, act: Callable[[], _T]) -> _T | None:
        """What `act` returns on the first rank. It runs on every rank that writes files; all ranks have to call this."""
        return self._together(lambda: act() if self.args.should_save else None)[0]

    def _together(self, act: Callable[[], _T]) -> list[_T]:
        """What `act` returns on every rank. An error on one is raised on all, which would otherwise wait for it forever."""
        if self.args.world_size == 1:
            return [act()]
        own: tuple[Any, Exception | None]
        try:
            own = (act(), None)
        except Exception as error:
            own = (None, error)
        outcomes: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(outcomes, own)
        for raised in (own[1], *(error for _, error in outcomes)):
            if raised is not None:
                raise raised
        return [value for value, _ in outcomes]


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write a model to; its files move to `folder`, one by one, when all of them are on the disk.

    Raises:
        DiskError: if the disk refuses to write; the files in `folder` stay as they are.
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
