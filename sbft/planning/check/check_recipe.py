"""Checks a run before it starts: whether it can start, how long it is, what memory it needs, and what will go wrong."""

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
_NOT_SHARDED = "Memory is predicted for one process. Here each process holds its share of the weights and one whole layer."
_NOT_MADE = "model-cannot-be-made"
_EXIT_CODES = {"note": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Check:
    """What is known about a run before it starts."""

    prepared: Prepared
    findings: list[Finding]
    length: RunLength
    duration: Duration | None
    """None where no earlier run is comparable."""
    prediction: Prediction | None
    """None where the model cannot be traced."""
    available_bytes: int

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong, 1 if there are warnings, 2 if there are errors."""
        return max((_EXIT_CODES[finding.severity] for finding in self.findings), default=0)


def check(recipe: Recipe, predict: Predict = predict_recipe) -> Check:
    """Read everything that a run reads, except the weights, and predict how it will go. Trains and writes nothing.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        predict: predicts the peak memory.

    Raises:
        SbftError: if the run could not start; the message lists every problem.
    """
    prepared = _prepare(recipe)
    findings = [*find(prepared), *find_in_model(prepared, (*MODEL_CHECKS, grid_noise))]
    length = run_length(prepared)
    available = available_bytes()
    prediction, memory_finding = expected_memory(prepared, predict, available=available)
    findings += [finding for finding in (memory_finding, _output_folder(recipe)) if finding is not None]
    return Check(prepared, findings, length, duration(prepared, length), prediction, available)


def find(prepared: Prepared, checks: Iterable[Callable[[Prepared], Finding | None]] = CHECKS) -> list[Finding]:
    """Run the checks that apply, and return what they find."""
    # Pretraining has windows of tokens, no examples.
    applicable = (check for check in checks if not (prepared.pretrains and check in EXAMPLES_CHECKS))
    return [finding for check in applicable if (finding := check(prepared)) is not None]


def expected_memory(
    prepared: Prepared, predict: Predict = predict_recipe, *, available: int | None = None
) -> tuple[Prediction | None, Finding | None]:
    """Predict a run's peak memory (None where the model cannot be traced), with a finding if it is a problem.

    Args:
        prepared: what the run reads.
        predict: predicts the peak.
        available: bytes to compare it with; what is free now when None.
    """
    if prepared.recipe.distributed is not None:
        return None, Finding("peak-not-predicted", "note", "The peak of a sharded model is not predicted", _NOT_SHARDED)
    arguments: dict[str, Any] = row_sizes(prepared)._asdict()
    if is_scratch(prepared.recipe.model):
        arguments["config"] = scratch_config(prepared.recipe.model, prepared.tokenizer)
    try:
        prediction = predict(prepared.recipe, **arguments)
    except PlanError as error:
        return None, Finding("peak-not-predicted", "note", "The peak memory cannot be predicted", str(error))
    except SbftError as error:
        return None, Finding(_NOT_MADE, "error", "The model cannot be made trainable", str(error))
    return prediction, fit(prepared, prediction, available_bytes() if available is None else available)


def warnings_in_brief(prepared: Prepared, *further_findings: Finding | None) -> list[str]:
    """A line for each warning and error, for a run that continues despite them.

    Truncated examples are left out: the run reports these itself. So is a model that cannot be made: the run fails there.

    Args:
        prepared: what the run reads.
        further_findings: those of `expected_memory` and `find_in_model`.
    """
    findings = [*find(prepared, (check for check in CHECKS if check is not truncated)), *further_findings]
    return [
        f"Warning: {finding.title}. {finding.why if finding.fix is None else f'To fix it: {finding.fix}'}"
        for finding in findings
        if finding is not None and finding.severity != "note" and finding.key != _NOT_MADE
    ]


def _prepare(recipe: Recipe) -> Prepared:
    try:
        return prepare(recipe)
    except SbftError as error:
        problems = _problems(recipe)
        if len(problems) < 2:
            raise
        raise SbftError("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)])) from error


def _problems(recipe: Recipe) -> list[str]:
    """Every problem in what `prepare` reads; `prepare` itself stops at the first."""
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
    """An output folder that `sbft train` would refuse: unwritable, or in use and requiring --resume or --overwrite."""
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
