"""What only transformers and torch can say of a suite, asked in a process of its own: the runner's stays small."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

from sbft.bench.suite import Suite, refusal
from sbft.bench.suite_runs import possible_runs
from sbft.errors import RecipeError, SbftError
from sbft.recipe.methods import METHODS


def check_recipes(suite: Suite) -> list[str]:
    """Check the recipe of every run, and read the data of every task, before the first is made.

    Returns:
        What CUDA_VISIBLE_DEVICES calls each GPU of this machine; empty where there is none.

    Raises:
        RecipeError: with every problem of every recipe at once, or else of the data.
    """
    done = subprocess.run(
        [sys.executable, "-m", "sbft.bench.suite_check"], input=suite.to_yaml(), capture_output=True, text=True
    )
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RecipeError(f"The suite's recipes could not be checked: {told[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["problems"]:
        raise refusal(answer["problems"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(answer["gpus"])]
    return names[: answer["gpus"]]


def recipe_problems(suite: Suite) -> list[str]:
    """Every problem of a recipe of the suite, once, under the first run that has it. Imports transformers: seconds."""
    from sbft.recipe.draft import Draft
    from sbft.recipe.problems import find_problems

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for run in possible_runs(suite):
        # All seeds and rates of a row have the same keys.
        row = (run.task, run.variant)
        if row in seen or METHODS[suite.method_of(run.variant)].missing_packages:
            continue
        seen.add(row)
        name = f"{run.task}/{run.variant}"
        for problem in find_problems(Draft(run.recipe(suite), name)):
            found.setdefault(problem.removeprefix(f"{name}: "), problem)
    return list(found.values())


def data_problems(suite: Suite) -> list[str]:
    """Why the data of a task cannot be read, or may not be used so; a model's task and phase are read once, by their first run.

    Test runs come hours after the validation runs that choose their rates: too late to hear of a misspelt file.
    """
    from sbft.data.sources import read_splits
    from sbft.recipe.pretraining import is_pretraining
    from sbft.runs.token_data import load_tokens

    found: dict[str, None] = {}
    seen: set[tuple[str, str, str]] = set()
    for run in possible_runs(suite):
        part = (run.model, run.task, run.phase)
        if part in seen or METHODS[suite.method_of(run.variant)].missing_packages:
            continue
        seen.add(part)
        recipe = run.whole_recipe(suite)
        try:
            if is_pretraining(recipe.model_dump(exclude_none=True)):
                load_tokens(recipe)  # prepared here on first use, not in the time of the first run
            else:
                read_splits(recipe.data)
        except SbftError as error:
            found.setdefault(f"tasks.{run.task}.data: {error}")
    return list(found)


def _main() -> None:
    gc.disable()  # a short life, most of it imports, which the collector would walk again and again
    import torch
    import yaml

    suite = Suite.model_validate(yaml.safe_load(sys.stdin.read()))
    problems = recipe_problems(suite) or data_problems(suite)
    print(json.dumps({"problems": problems, "gpus": torch.cuda.device_count()}))


if __name__ == "__main__":
    _main()
