"""The output folder: whether a run may write there, and what there is to resume from."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sbft import files
from sbft.errors import TrainingError
from sbft.recipe import Recipe
from sbft.runs.record import FILE_NAME, RunRecord
from sbft.training.checkpointing.checkpoints import INCOMPLETE, find_checkpoint, sound_checkpoint
from sbft.training.checkpointing.disk_errors import writing

RECIPE_FILE = "recipe.yaml"
# What a run leaves that failed before it had trained anything. It may be overwritten without asking.
_FAILED_EARLY = {FILE_NAME, RECIPE_FILE, INCOMPLETE}
# What a resumed run cannot change: its weights, its examples, and what the checkpoint restores whatever the recipe says.
_FIXED = (
    "model", "tokenizer", "method", "dtype", "weights", "data", "lora", "freeze", "optimizer", "training.seed",
    "training.learning_rate",
)  # fmt: skip
_FREE = ("optimizer.gradient_release",)
# If the recipe leaves it open, the run derives it from the data and writes it into the saved recipe.
_DECIDED = "data.chat_template_kwargs.enable_thinking"


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix a run with what is in the folder already. Changes nothing.

    Raises:
        TrainingError: if the folder is not empty and neither option says what to do about it, or if `overwrite` would
            empty a folder that no run has made.
    """
    if resume and overwrite:
        raise TrainingError("--resume and --overwrite are both given: one continues a run, the other starts over. Keep one.")
    _check_it_can_be_written(folder)
    if resume:
        return
    if not folder.is_dir():
        return
    entries = {entry.name for entry in folder.iterdir()}
    if entries and entries <= _FAILED_EARLY and _failed(folder):
        return
    if entries and not overwrite:
        again = " --resume to continue from its last checkpoint," if find_checkpoint(folder) else ""
        raise TrainingError(
            f"The output folder {folder} exists and is not empty. Add{again} --overwrite to replace it, or choose "
            "another --output-dir."
        )
    if entries and FILE_NAME not in entries:
        raise TrainingError(
            f"--overwrite would remove everything in {folder}, which no run of sbft has made (there is no "
            f"{FILE_NAME} in it). Empty it yourself, or choose another --output-dir."
        )


def checkpoint_to_resume(folder: Path) -> tuple[Path, dict[Path, str]]:
    """The newest intact checkpoint in a folder, and what is wrong with each newer one. Changes nothing.

    Raises:
        TrainingError: if there is none.
    """
    checkpoint, damaged = sound_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint, damaged
    missing = "no checkpoint"
    if damaged:
        newest, reason = next(iter(damaged.items()))
        missing = f"no intact checkpoint ({newest.name}: {reason})"
    has_begun = folder.is_dir() and {entry.name for entry in folder.iterdir()} - _FAILED_EARLY
    way = "with --overwrite instead of" if has_begun else "without"
    raise TrainingError(f"There is {missing} in {folder}, so there is nothing to resume. Type the same command {way} --resume.")


def _failed(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() and RunRecord.load(folder).status != "ok"


def _check_it_can_be_written(folder: Path) -> None:
    """Refuse a folder that cannot be written, before a download or hours of training go into it."""
    nearest = folder.absolute()
    while not (nearest.exists() or nearest.is_symlink()):
        nearest = nearest.parent
    if not nearest.is_dir():
        what = "is a file" if nearest == folder.absolute() else f"cannot be made, because {nearest} is no folder"
        raise TrainingError(f"The output folder {folder} {what}. Choose another --output-dir.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise TrainingError(
            f"The output folder {folder} cannot be written, because you have no permission to write to {nearest}. "
            "Change that, or choose another --output-dir."
        )


def check_nothing_needed_is_removed(folder: Path, recipe: Recipe) -> None:
    """Refuse to empty a folder that the run reads from.

    Raises:
        TrainingError: if the model or the data are in it.
    """
    data = recipe.data
    sources = {
        "model": recipe.model,
        "data.train": data.train,
        "data.validation": data.validation,
        "data.eval": data.eval,
        "data.replay.data": None if data.replay is None else data.replay.data,
        **{f"evaluation.watch.{name}.data": watched.data for name, watched in recipe.evaluation.watch.items()},
    }
    emptied = folder.resolve()
    for key, source in sources.items():
        if source is None or not Path(source).exists():
            continue
        path = Path(source).resolve()
        if path == emptied or emptied in path.parents:
            raise TrainingError(
                f"--overwrite would empty {folder}, and {key} ({source}) is in it. Choose another --output-dir."
            )


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to resume from the checkpoint of another run. Changes nothing.

    Raises:
        TrainingError: if the folder's recipe has another model, other data, or anything else that must stay as it was.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    saved = _flat(_with_later_settings(yaml.safe_load(path.read_text(encoding="utf-8"))))
    new = _flat(yaml.safe_load(recipe.to_yaml()))
    differing = [
        f"{key} (there {saved.get(key)}, here {new.get(key)})"
        for key in sorted(saved.keys() | new.keys())
        if saved.get(key) != new.get(key) and is_fixed(key) and (key in new or key != _DECIDED)
    ]
    if differing:
        raise TrainingError(
            f"The run in {folder} was started with another recipe, so --resume would mix two. They differ in "
            f"{', '.join(differing)}. To resume it, type: sbft train {path} --resume. To replace it, type "
            "--overwrite instead of --resume."
        )


def _with_later_settings(written: Any) -> Any:
    """A recipe that an earlier version wrote, with the defaults of settings that are new since."""
    try:
        return yaml.safe_load(Recipe.model_validate(written).to_yaml())
    except ValidationError:
        return written  # no valid recipe any more: the differing settings are named


def is_fixed(key: str) -> bool:
    """Whether a setting, by its dotted key, must stay as it was when a run is resumed."""
    return _is_under(key, _FIXED) and not _is_under(key, _FREE)


def _is_under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, as `--set` takes them."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}


def _make_folder(folder: Path, *, empty: bool) -> None:
    """Make the folder; with `empty`, remove what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir() if empty else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@dataclass
class RunFolder:
    """The folder of a run, and whether the run has begun to write there."""

    folder: Path
    resume: bool
    main: bool
    """Whether this process is the one, of several, that writes."""
    open: bool = False

    def begin(self, recipe: Recipe) -> None:
        """Make the folder, empty unless resuming, and keep the recipe in it."""
        if self.main:
            with writing("The recipe", self.folder):
                _make_folder(self.folder, empty=not self.resume)
                files.write_text(self.folder / RECIPE_FILE, recipe.to_yaml())
        self.open = True

    def save(self, record: RunRecord) -> None:
        """Write `run.json`.

        Raises:
            DiskError: if it cannot be written; the previous one stays.
        """
        if self.main:
            with writing("The record of the run", self.folder):
                record.save(self.folder)
