"""The suite: what to compare. Reads and checks its YAML, and reports all problems together."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError, field_validator

from sbft.errors import RecipeError
from sbft.files import shipped_file, shipped_names
from sbft.recipe.draft import Draft
from sbft.recipe.methods import METHODS
from sbft.recipe.pretraining import is_pretraining
from sbft.recipe.schema import DataConfig, EvaluationConfig, fields_at
from sbft.recipe.wording import nearest

Key = tuple[str, ...]

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ELSEWHERE = {
    "training.learning_rate": "learning_rates of each method",
    "training.seed": "seeds, and search_seeds for the choice of the learning rate",
    "model": "models",
    "method": "method, beside set",
    "output_dir": "--output-dir on the command line",
}
"""Keys of a recipe that a suite sets itself, and where to write them instead."""
_FOR_ALL = {
    "data": "tasks.NAME.data",
    "evaluation": "tasks.NAME.evaluation",
    "training.num_train_epochs": "training of the suite",
    "training.max_steps": "training of the suite",
}
"""Keys and sections that must be the same for all methods of a suite, and where to write them."""


def model_folder(model: str) -> str:
    """A folder name for a model."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.removeprefix("builtin:")).strip("-.")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Task(_Section):
    """What to learn, and how to measure it."""

    data: DataConfig
    """The data section of a recipe. Its seed defaults to the run's."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """The evaluation section of a recipe; the first metric decides the learning rate."""


class Variant(_Section):
    """A row of the comparison: a method, perhaps with other settings."""

    method: str | None = None
    """A method of sbft; the variant's own name when None."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values by recipe key, dotted as for --set. They take precedence over the suite's."""
    learning_rates: list[PositiveFloat] | None = Field(None, min_length=1)
    """The grid that validation chooses from; a single rate needs no validation."""
    learning_rates_from: str | None = None
    """Use the rate chosen for this other variant."""

    @field_validator("set", mode="after")
    @classmethod
    def _dotted(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(_dotted_keys(value))


class Suite(_Section):
    """Models x tasks x methods x learning rates x seeds, with the same budget of examples for all."""

    summary: str = ""
    """One line: what it compares, and what it requires."""
    models: list[str] = Field(min_length=1)
    """Hub ids, local folders, or builtin:NAME."""
    tasks: dict[str, Task] = Field(min_length=1)
    methods: dict[str, Variant] = Field(min_length=1)
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    """Seeds of the test runs."""
    search_seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    """Seeds of the validation runs, which choose the learning rate."""
    training: dict[str, Any] = Field(default_factory=dict)
    """The training section of every run."""
    baseline: str = "lora"
    """The method that differences are measured against."""
    time_limit_s: PositiveFloat | None = None
    """Seconds after which a run is ended and counts as failed."""
    keep_models: bool = False
    """Keep the trained weights, not only records and predictions."""

    def to_yaml(self) -> str:
        """The suite as YAML that `load_suite` reads."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False, width=100)

    def ordered_methods(self) -> list[str]:
        """Names of the variants, with the baseline and sbft first, so that an interrupted suite has these rows."""
        first = [name for name in (self.baseline, "sbft") if name in self.methods]
        return list(dict.fromkeys([*first, *self.methods]))

    def method_of(self, variant: str) -> str:
        """The method of sbft that a variant is."""
        return self.methods[variant].method or variant

    def grid(self, variant: str) -> list[float]:
        """The learning rates that a variant may run at: its own grid, or that of the variant it takes its rate from."""
        source = self.methods[variant].learning_rates_from or variant
        return list(self.methods[source].learning_rates or [])

    def score_name(self, task: str) -> str:
        """The metric that decides the learning rate of a task."""
        evaluation = self.tasks[task].evaluation
        return next(iter(evaluation.metrics), "label_accuracy" if evaluation.labels else "loss")


def suite_names() -> list[str]:
    """Names of the suites that ship with sbft."""
    return shipped_names("suites")


def find_suite(source: str | Path) -> Path:
    """The file of a suite: a path, or the name of one that ships with sbft.

    Raises:
        RecipeError: if there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in suite_names():
        return shipped_file("suites", str(source))
    near = difflib.get_close_matches(str(source), suite_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"There is no suite {str(source)!r}: expected a YAML file, or one of those that ship with sbft: "
        f"{', '.join(suite_names())}.{hint}"
    )


def load_suite(source: str | Path, overrides: list[str] | None = None) -> Suite:
    """Read a suite and check what can be checked without loading torch; `sbft.bench.suite_check` does the rest.

    Args:
        source: a YAML file, or the name of a suite that ships with sbft.
        overrides: `a.b=c` each, with the value in YAML; they take precedence over the file.

    Raises:
        RecipeError: if it has problems; the message lists them all.
    """
    draft = Draft.read(find_suite(source))
    draft.apply_overrides(overrides or [])
    problems = list(draft.problems)
    try:
        suite = Suite.model_validate(draft.content)
    except ValidationError as error:
        for detail in error.errors():
            key = tuple(str(part) for part in detail["loc"])
            problems.append(f"{draft.origin(key)}: {'.'.join(key)} {_schema_problem(key, detail)}")
        raise refusal(problems) from error
    problems += [f"{draft.origin(key)}: {'.'.join(key)} {text}" for key, text in _contradictions(suite)]
    if problems:
        raise refusal(problems)
    return suite


def refusal(problems: list[str]) -> RecipeError:
    """An error that lists every problem of a suite."""
    if len(problems) == 1:
        return RecipeError(problems[0])
    return RecipeError("\n".join([f"{len(problems)} problems in the suite:", *(f"- {text}" for text in problems)]))


def uneven_grids(suite: Suite) -> str | None:
    """A sentence on methods whose grids differ in width, which makes the search unfair; None if all are equally wide."""
    grids: dict[tuple[int, int], list[str]] = {}
    for name in suite.ordered_methods():
        rates = suite.methods[name].learning_rates
        if rates:
            # Factors of 3 and 3.33, as in 1, 3, 10, 30, count as the same width, so widths are in quarters of a power of ten.
            width = round(4 * math.log10(max(rates) / min(rates)))
            grids.setdefault((len(set(rates)), width), []).append(name)
    if len(grids) < 2:
        return None
    widths = [
        f"{', '.join(names)}: {count} rate{'s' * (count > 1)}, over a factor of "
        f"{max(suite.grid(names[0])) / min(suite.grid(names[0])):.3g}"
        for (count, _), names in grids.items()
    ]
    return f"The learning rates are not searched over grids of the same width ({'; '.join(widths)})."


def _dotted_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values. The options of a generated task or of a metric are one value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in {"data", "training", "optimizer", "lora", "evaluation"}:
            yield from _dotted_keys(value, f"{key}.")
        else:
            yield key, value


def _schema_problem(key: Key, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        if len(key) == 1:
            return f"is not a key of a suite{nearest(key[0], Suite.model_fields)}; expected {', '.join(Suite.model_fields)}."
        sections: dict[str, type[BaseModel]] = {"tasks": Task, "methods": Variant}
        # methods.NAME.KEY, and tasks.NAME.data.KEY.
        fields = sections[key[0]].model_fields if len(key) == 3 else fields_at(key[2:-1])
        return f"is not a key here{nearest(key[-1], fields)}; expected one of {', '.join(fields)}."
    if detail["type"] == "missing":
        return "is missing."
    expected = detail["msg"].removeprefix("Input should be ").partition(", unable to ")[0]
    return f"is {detail['input']!r}, expected {expected}."


def _contradictions(suite: Suite) -> Iterator[tuple[Key, str]]:
    for section, names in (("tasks", suite.tasks), ("methods", suite.methods)):
        for name in names:
            if not _FOLDER_NAME.fullmatch(name):
                yield (section, name), "names a folder: expected only letters, digits, dots, dashes and underscores."
    yield from _model_problems(suite.models)
    for name in ("seeds", "search_seeds"):
        if len(set(getattr(suite, name))) < len(getattr(suite, name)):
            yield (name,), f"is {getattr(suite, name)}, which has a seed twice. Keep one."
    if suite.baseline not in suite.methods:
        yield (
            ("baseline",),
            f"is {suite.baseline}, expected one of methods: {', '.join(suite.methods)}. Write baseline: NAME.",
        )
    for key in suite.training:
        if (place := _ELSEWHERE.get(f"training.{key}")) is not None:
            yield ("training", key), f"cannot be set here: write {place}."
    for name in suite.methods:
        yield from _variant_problems(suite, name)
    for name, task in suite.tasks.items():
        for text in _task_problems(suite, task.data):
            yield ("tasks", name, "data"), text


def _model_problems(models: list[str]) -> Iterator[tuple[Key, str]]:
    """Models whose runs would have no folder of their own. A single model needs none."""
    folders: dict[str, str] = {}
    for model in models if len(models) > 1 else ():
        name = model_folder(model)
        if not _FOLDER_NAME.fullmatch(name):
            yield (
                ("models",),
                f"has {model!r}, from which no folder name can be made: expected a letter or a digit in it.",
            )
        elif name in folders:
            yield (
                ("models",),
                f"has {folders[name]!r} and {model!r}, whose runs would share the folder {name}. Keep one, or give them "
                "paths that differ in more than punctuation.",
            )
        folders.setdefault(name, model)


def _variant_problems(suite: Suite, name: str) -> Iterator[tuple[Key, str]]:
    variant, at = suite.methods[name], ("methods", name)
    method = suite.method_of(name)
    if method not in METHODS:
        yield (
            (*at, "method") if variant.method else at,
            f"is not a method of sbft ({method!r}), expected one of {', '.join(METHODS)}{nearest(method, METHODS)}. "
            f"To name a variant of a method, write {name}: {{method: sbft, set: {{...}}}}.",
        )
    if (variant.learning_rates is None) == (variant.learning_rates_from is None):
        yield at, "requires either learning_rates: [1.0e-4, 3.0e-4] or learning_rates_from: OTHER."
    rates = variant.learning_rates or []
    if len(set(rates)) < len(rates):
        yield (*at, "learning_rates"), f"is {rates}, which has a rate twice. Keep one."
    other = variant.learning_rates_from
    if other is not None and (other not in suite.methods or suite.methods[other].learning_rates is None):
        having = [other_variant for other_variant, settings in suite.methods.items() if settings.learning_rates]
        yield (*at, "learning_rates_from"), f"is {other}, expected a method with learning_rates: {', '.join(having)}."
    for key in variant.set:
        if key in _ELSEWHERE:
            yield (*at, "set", key), f"cannot be set here: write {_ELSEWHERE[key]}."
        elif key.startswith("data.replay"):
            continue  # a part of how a method trains; what it is measured on stays the same
        elif (place := _FOR_ALL.get(key, _FOR_ALL.get(key.partition(".")[0]))) is not None:
            yield (
                (*at, "set", key),
                "cannot be set for a single method: data, measurement and number of examples must be the same for all, so "
                f"that results can be compared. Write it in {place}.",
            )


def _task_problems(suite: Suite, data: DataConfig) -> Iterator[str]:
    if is_pretraining({"data": data.model_dump(exclude_none=True)}):
        return  # token data has its own validation part
    generated = data.train.startswith("generated:")
    if data.eval is None and data.eval_size and not generated:
        yield (
            "splits its evaluation part off the training file, so validation runs would train on it or choose by it. "
            "Put these rows into a separate file and write eval: FILE."
        )
        return
    if all(len(suite.grid(name)) < 2 for name in suite.methods):
        return
    if data.validation is None and not data.validation_size:
        yield "has no validation part to choose the learning rate on: write validation_size: 100, or validation: FILE."
    if data.eval is None and not data.eval_size:
        setting = "eval_size: 100" if generated else "eval: FILE"
        yield f"has no evaluation part for the final result: write {setting}."
