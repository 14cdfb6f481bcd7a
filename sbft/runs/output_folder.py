"""The output folder: whether a run may write there, and what it finds to go on from."""

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
# What is left where a run failed before it had trained anything: nobody misses it.
_FAILED_EARLY = {FILE_NAME, RECIPE_FILE, INCOMPLETE}
# What a run cannot change half-way: other weights or other examples, or what a checkpoint brings back whatever the
# recipe says.
_FIXED = (
    "model", "tokenizer", "method", "dtype", "data", "lora", "freeze", "optimizer", "training.seed", "training.learning_rate",
)  # fmt: skip
_FREE = ("optimizer.gradient_release",)
# Where a recipe leaves it open, the run has written down what followed from its data.
_DECIDED = "data.chat_template_kwargs.enable_thinking"


def check_output_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix a run with what is there already. Changes nothing.

    Raises:
        TrainingError: if the folder is not empty, unless one of the two says what to do with that; if `overwrite`
            would empty a folder that no run has made.
    """
    if resume and overwrite:
        raise TrainingError("--resume and --overwrite are both given: one goes on, one begins anew. Keep one.")
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
            f"The output folder {folder} exists and is not empty. Add{again} --overwrite to replace it, or type "
            "another --output-dir."
        )
    if entries and FILE_NAME not in entries:
        raise TrainingError(
            f"--overwrite would remove everything in {folder}, which no run of sbft has made (it holds no "
            f"{FILE_NAME}). Empty it yourself, or type another --output-dir."
        )


def checkpoint_to_resume(folder: Path) -> tuple[Path, dict[Path, str]]:
    """The newest sound checkpoint of the run in a folder, and what is wrong with each newer one. Changes nothing.

    Raises:
        TrainingError: if there is none.
    """
    checkpoint, damaged = sound_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint, damaged
    found = "no checkpoint"
    if damaged:
        newest, reason = next(iter(damaged.items()))
        found = f"no sound checkpoint ({newest.name}: {reason})"
    begun = folder.is_dir() and {entry.name for entry in folder.iterdir()} - _FAILED_EARLY
    way = "with --overwrite in place of" if begun else "without"
    raise TrainingError(f"There is {found} in {folder}, so nothing to resume. Type the same command {way} --resume.")


def _failed(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() and RunRecord.load(folder).status != "ok"


def _check_it_can_be_written(folder: Path) -> None:
    """Refuse a folder that cannot be made, before hours or a download have gone into what it shall hold."""
    there = folder.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if not there.is_dir():
        what = "is a file" if there == folder.absolute() else f"cannot be made, because {there} is no folder"
        raise TrainingError(f"The output folder {folder} {what}. Type another --output-dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainingError(
            f"The output folder {folder} cannot be written, because {there} gives no permission to. "
            "Change that, or type another --output-dir."
        )


def check_nothing_needed_is_removed(folder: Path, recipe: Recipe) -> None:
    """Refuse to empty a folder that holds what the run reads.

    Raises:
        TrainingError: if the model or the data lie in it.
    """
    data = recipe.data
    sources = {
        "model": recipe.model,
        "data.train": data.train,
        "data.validation": data.validation,
        "data.eval": data.eval,
    }
    whole = folder.resolve()
    for key, source in sources.items():
        if source is None or not Path(source).exists():
            continue
        path = Path(source).resolve()
        if path == whole or whole in path.parents:
            raise TrainingError(
                f"--overwrite would empty {folder}, in which {key} ({source}) lies. Type another --output-dir."
            )


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from the checkpoint of another run. Changes nothing.

    Raises:
        TrainingError: if the folder's recipe has another model, other data, or anything else that its checkpoint fixes.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    former = _flat(_with_later_settings(yaml.safe_load(path.read_text(encoding="utf-8"))))
    wanted = _flat(yaml.safe_load(recipe.to_yaml()))
    differing = [
        f"{key} (there {former.get(key)}, here {wanted.get(key)})"
        for key in sorted(former.keys() | wanted.keys())
        if former.get(key) != wanted.get(key) and is_fixed(key) and (key in wanted or key != _DECIDED)
    ]
    if differing:
        raise TrainingError(
            f"The run in {folder} was begun with another recipe, so --resume would mix two: they differ in "
            f"{', '.join(differing)}. To resume it, type: sbft train {path} --resume. To replace it, give "
            "--overwrite in place of --resume."
        )


def _with_later_settings(written: Any) -> Any:
    """A recipe that an earlier version has written, with the defaults of settings that it did not have."""
    try:
        return yaml.safe_load(Recipe.model_validate(written).to_yaml())
    except ValidationError:
        return written  # its settings differ from any recipe of now, and are named


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
            with writing("The recipe", self.folder):
                _make_folder(self.folder, empty=not self.resume)
                files.write_text(self.folder / RECIPE_FILE, recipe.to_yaml())
        self.open = True

    def save(self, record: RunRecord) -> None:
        """Write `run.json`.

        Raises:
            DiskError: if the disk refuses; the former one stays.
        """
        if self.main:
            with writing("The record of the run", self.folder):
                record.save(self.folder)
