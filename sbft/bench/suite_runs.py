"""The runs of a suite: which there are, where their folders are, and what is stored there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sbft.bench.archive import PROCESS_FILE, archived_runs
from sbft.bench.suite import Suite, load_suite, model_folder
from sbft.recipe.defaults import complete
from sbft.recipe.schema import Recipe
from sbft.runs.record import FILE_NAME, RunRecord

SUITE_FILE = "suite.yaml"
RUNS_FOLDER = "runs"
LOG_FILE = "log.txt"
RECIPE_FILE = "recipe.yaml"
Phase = Literal["validation", "test"]


@dataclass(frozen=True)
class Run:
    """One training run of a suite."""

    model: str
    task: str
    variant: str
    learning_rate: float
    seed: int
    phase: Phase
    prefix: str = ""
    """The model's folder name and a slash where a suite has several models, else empty."""

    @property
    def name(self) -> str:
        """Its folder, relative to `runs`."""
        return run_name(self.prefix, self.task, self.variant, f"{self.learning_rate:g}", self.phase, self.seed)

    def recipe(self, suite: Suite) -> dict[str, Any]:
        """Its recipe, without the method's defaults."""
        task, variant = suite.tasks[self.task], suite.methods[self.variant]
        content: dict[str, Any] = {
            "model": self.model,
            "method": suite.method_of(self.variant),
            "data": task.data.model_dump(mode="json", exclude_unset=True),
            "training": dict(suite.training),
            "evaluation": task.evaluation.model_dump(mode="json", exclude_unset=True),
        }
        content["data"].setdefault("seed", self.seed)
        for key, value in variant.set.items():
            *path, last = key.split(".")
            section = content
            for part in path:
                section = section.setdefault(part, {})
            section[last] = value
        content["training"].update(learning_rate=self.learning_rate, seed=self.seed)
        if self.phase == "validation":
            # A validation run must not see the evaluation part.
            content["data"].pop("eval", None)
            content["data"].pop("eval_size", None)
            content["evaluation"]["before"] = False
            content["evaluation"].pop("watch", None)
        return content

    def whole_recipe(self, suite: Suite) -> Recipe:
        """Its recipe with the method's defaults, as `sbft train` resolves it."""
        return Recipe.model_validate(complete(self.recipe(suite)))


def run_name(prefix: str, task: str, variant: str, rate: str, phase: str, seed: int) -> str:
    """The name of a run from its parts."""
    return f"{prefix}{task}/{variant}/lr={rate}/{phase}-seed={seed}"


def prefix(suite: Suite, model: str) -> str:
    """The prefix of the names of a model's runs; empty where the suite has one model."""
    return f"{model_folder(model)}/" if len(suite.models) > 1 else ""


def run_folder(folder: Path, run: Run) -> Path:
    """The folder of a run, inside its suite's."""
    return folder / RUNS_FOLDER / run.name


def stored_suite(folder: Path) -> Suite | None:
    """The suite whose runs are in a folder; None if it is not a suite's folder."""
    path = folder / SUITE_FILE
    return load_suite(path) if path.is_file() else None


def groups(suite: Suite) -> Iterator[tuple[str, str]]:
    """Each model with each task."""
    return ((model, task) for model in suite.models for task in suite.tasks)


def validation_runs(suite: Suite) -> list[Run]:
    """The runs that choose learning rates. A variant with a single rate, or the rate of another variant, has none."""
    return [
        run
        for model, task in groups(suite)
        for variant in suite.ordered_methods()
        for run in searches(suite, model, task, variant)
    ]


def searches(suite: Suite, model: str, task: str, variant: str) -> list[Run]:
    """The validation runs of one row."""
    rates = suite.methods[variant].learning_rates or []
    if len(rates) < 2:
        return []
    return [
        Run(model, task, variant, rate, seed, "validation", prefix(suite, model))
        for seed in suite.search_seeds
        for rate in rates
    ]


def repeats(suite: Suite, model: str, task: str, variant: str, rate: float) -> list[Run]:
    """The test runs of one row at a learning rate."""
    return [Run(model, task, variant, rate, seed, "test", prefix(suite, model)) for seed in suite.seeds]


def possible_runs(suite: Suite) -> list[Run]:
    """Every run that the suite may have: all validation runs, and test runs at every rate of each grid."""
    tests = [
        run
        for model, task in groups(suite)
        for variant in suite.ordered_methods()
        for rate in suite.grid(variant)
        for run in repeats(suite, model, task, variant, rate)
    ]
    return [*validation_runs(suite), *tests]


def read_run(folder: Path, run: Run) -> RunRecord | None:
    """The record of a finished run, from its folder or the suite's archive; None if it is not finished."""
    record = stored_record(run_folder(folder, run))
    if record is None and (archived := archived_runs(folder).get(run.name)):
        return replace(archived.record)  # a copy: the archive is read once
    return record if record is not None and record.is_result else None


def stored_record(folder: Path) -> RunRecord | None:
    """The record in the folder of a run, finished or not; None if there is none."""
    return RunRecord.load(folder) if (folder / FILE_NAME).is_file() else None


def read_process(folder: Path, run: Run) -> dict[str, Any]:
    """What is known about a finished run's process, from its folder or the suite's archive; empty if nothing is."""
    path = run_folder(folder, run) / PROCESS_FILE
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    archived = archived_runs(folder).get(run.name)
    return {} if archived is None else archived.process


def seconds(folder: Path, run: Run, record: RunRecord) -> float | None:
    """How long a finished run took, including the start of its process where known."""
    process = read_process(folder, run)
    if process:
        return float(process["elapsed_s"])
    if record.total_s is not None:
        return record.total_s
    return None if record.train_s is None else record.train_s + (record.eval_s or 0.0)
