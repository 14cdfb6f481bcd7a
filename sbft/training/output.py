"""The output folder: whether a run may write there, and what it finds to go on from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from sbft.errors import TrainingError
from sbft.recipe import Recipe
from sbft.training.record import FILE_NAME, RunRecord

RECIPE_FILE = "recipe.yaml"
# What is left where a run failed before it had trained anything: nobody misses it.
_FAILED_EARLY = {FILE_NAME, RECIPE_FILE}


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix a run with what is there already. Changes nothing.

    Raises:
        TrainingError: if the folder is not empty, unless one of the two says what to do with that; if there is
            nothing to resume; if `overwrite` would empty a folder that no run has made.
    """
    if resume and overwrite:
        raise TrainingError("--resume and --overwrite are both given: one goes on, one begins anew. Keep one.")
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"The output folder {folder} is a file. Type another --output-dir.")
    if resume:
        if find_checkpoint(folder) is None:
            raise TrainingError(
                f"There is no checkpoint in {folder}, so nothing to resume. Type the same command without --resume."
            )
        return
    if not folder.is_dir():
        return
    entries = {entry.name for entry in folder.iterdir()}
    if entries and entries <= _FAILED_EARLY and _failed(folder):
        return
    if entries and not overwrite:
        again = " --resume to go on from its last checkpoint," if find_checkpoint(folder) else ""
        raise TrainingError(
            f"The output folder {folder} exists and is not empty. Add{again} --overwrite to replace it, or type "
            "another --output-dir."
        )
    if entries and FILE_NAME not in entries:
        raise TrainingError(
            f"--overwrite would remove everything in {folder}, which no run of sbft has made (it holds no "
            f"{FILE_NAME}). Empty it yourself, or type another --output-dir."
        )


def _failed(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() and RunRecord.load(folder).status != "ok"


def find_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in the folder of a run; None if it has none."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def _make_folder(folder: Path, *, empty: bool) -> None:
    """Make the folder, and remove what is in it if it shall be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir() if empty else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@dataclass
class RunFolder:
    """The folder of a run, and whether the run has taken possession of it."""

    folder: Path
    resume: bool
    main: bool
    """Whether this process, of several, writes."""
    open: bool = False

    def begin(self, recipe: Recipe) -> None:
        """Make the folder, empty unless resuming, and keep the recipe in it."""
        if self.main:
            _make_folder(self.folder, empty=not self.resume)
            (self.folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        self.open = True

    def save(self, record: RunRecord) -> None:
        """Write `run.json`."""
        if self.main:
            record.save(self.folder)
