"""What can be said of a run before it begins: whether it can, its length, its memory, and what will go wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbft.data.sources import read_splits
from sbft.errors import SbftError, TrainingError
from sbft.models.load import load_tokenizer
from sbft.models.scratch import is_scratch, scratch_config
from sbft.native.memory import available_bytes
from sbft.planning.check.examples import EXAMPLES_CHECKS, truncated
from sbft.planning.check.finding import Finding
from sbft.planning.check.grid_noise import grid_noise
from sbft.planning.check.length import Duration, RunLength, duration, row_sizes, run_length
from sbft.planning.check.memory import Predict, Prediction, fit
from sbft.planning.check.model import MODEL_CHECKS, find_in_model
from sbft.planning.check.processor import PROCESSOR_CHECKS
from sbft.planning.check.settings import SETTINGS_CHECKS
from sbft.planning.memory.predict import PlanError, predict_recipe
from sbft.recipe import Recipe
from sbft.recipe.pretraining import is_pretraining
from sbft.runs.build import training_arguments
from sbft.runs.output_folder import check_output_folder
from sbft.runs.prepare import Prepared, prepare

CHECKS: tuple[Callable[[Prepared], Finding | None], ...] = (*SETTINGS_CHECKS, *PROCESSOR_CHECKS, *EXAMPLES_CHECKS)
_NOT_SHARDED = (
    "Prediction knows a model in one process. Each of several holds its share of the weights, and one layer whole."
)
_NOT_MADE = "model-cannot-be-made"
_EXIT_CODES = {"note": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Check:
    """What is known of a run before it begins."""

    prepared: Prepared
    findings: list[Finding]
    length: RunLength
    duration: Duration | None
    """None where no former run was alike."""
    prediction: Prediction | None
    """None where its model cannot be traced."""
    available_bytes: int

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong, 1 if there are warnings, 2 if there are errors."""
        return max((_EXIT_CODES[finding.severity] for finding in self.findings), default=0)


def check(recipe: Recipe, predict: Predict = predict_recipe) -> Check:
    """Read all that a run reads, the weights aside, and say what is to be expected of it. Trains and writes nothing.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        predict: what predicts the peak of memory.

    Raises:
        SbftError: with every problem at once, if the run could not begin.
    """
    prepared = _prepare(recipe)
    findings = [*find(prepared), *find_in_model(prepared, (*MODEL_CHECKS, grid_noise))]
    length = run_length(prepared)
    available = available_bytes()
    prediction, of_memory = expected_memory(prepared, predict, available=available)
    findings += [found for found in (of_memory, _output_folder(recipe)) if found is not None]
    return Check(prepared, findings, length, duration(prepared, length), prediction, available)


def find(prepared: Prepared, checks: Iterable[Callable[[Prepared], Finding | None]] = CHECKS) -> list[Finding]:
    """The known signs that a run bears of going wrong."""
    chosen = (one for one in checks if not (prepared.pretrains and one in EXAMPLES_CHECKS))  # which look into rows
    return [finding for one in chosen if (finding := one(prepared)) is not None]


def expected_memory(
    prepared: Prepared, predict: Predict = predict_recipe, *, available: int | None = None
) -> tuple[Prediction | None, Finding | None]:
    """The peak of a run, None where its model cannot be traced; and what there is to say of it.

    Args:
        prepared: what the run reads.
        predict: what predicts the peak.
        available: bytes to compare it with; what is there now when None.
    """
    if prepared.recipe.distributed is not None:
        return None, Finding("peak-not-predicted", "note", "The peak of a sharded model is not predicted", _NOT_SHARDED)
    known: dict[str, Any] = row_sizes(prepared)._asdict()
    if is_scratch(prepared.recipe.model):
        known["config"] = scratch_config(prepared.recipe.model, prepared.tokenizer)
    try:
        prediction = predict(prepared.recipe, **known)
    except PlanError as error:
        return None, Finding("peak-not-predicted", "note", "The peak of memory cannot be predicted", str(error))
    except SbftError as error:
        return None, Finding(_NOT_MADE, "error", "The model cannot be made trainable", str(error))
    return prediction, fit(prepared, prediction, available_bytes() if available is None else available)


def warnings_in_brief(prepared: Prepared, *others: Finding | None) -> list[str]:
    """A line for each warning and error, for a run that goes on nevertheless; not what it says of its data anyway.

    Args:
        prepared: what the run reads.
        others: as `expected_memory` and `find_in_model` give them.
    """
    findings = find(prepared, (one for one in CHECKS if one is not truncated))
    # That the model cannot be made, the run says itself when it gets there.
    told = [
        one for one in [*findings, *others] if one is not None and one.severity != "note" and one.key != _NOT_MADE
    ]
    return [f"Warning: {one.title}. {one.why if one.mend is None else f'To fix it: {one.mend}'}" for one in told]


def _prepare(recipe: Recipe) -> Prepared:
    try:
        return prepare(recipe)
    except SbftError as error:
        problems = _problems(recipe)
        if len(problems) < 2:
            raise
        raise SbftError("\n".join([f"{len(problems)} problems:", *(f"- {one}" for one in problems)])) from error


def _problems(recipe: Recipe) -> list[str]:
    """What is wrong with each thing that `prepare` reads, of which it says only the first."""
    if is_pretraining(recipe.model_dump(exclude_none=True)):
        return []
    readers: tuple[Callable[[], object], ...] = (
        lambda: training_arguments(recipe, Path(str(recipe.output_dir))),
        lambda: load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code),
        lambda: read_splits(recipe.data),
    )
    problems = []
    for read in readers:
        try:
            read()
        except SbftError as error:
            problems.append(str(error))
    return problems


def _output_folder(recipe: Recipe) -> Finding | None:
    """Whether `sbft train` would refuse the folder: for good, or until it is told what to do with what lies there."""
    folder = Path(str(recipe.output_dir))
    try:
        check_output_folder(folder, resume=False, overwrite=False)
    except TrainingError as error:
        in_use = folder.is_dir() and any(folder.iterdir())
        return Finding(
            "output-folder-in-use" if in_use else "output-folder",
            "note" if in_use else "error",
            "The output folder is in use" if in_use else "The output folder cannot be written",
            str(error),
            "--output-dir DIR",
        )
    return None
