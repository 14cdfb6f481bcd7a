"""Checks of a suite that require transformers and torch, made in a separate process to keep the runner's small."""

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
    """Check the recipe of every run and read the data of every task, before the first run starts.

    Returns:
        The name of each GPU of this machine in CUDA_VISIBLE_DEVICES; empty where there is none.

    Raises:
        RecipeError: with every problem of every recipe, or else of the data.
    """
    done = subprocess.run(
        [sys.executable, "-m", "sbft.bench.suite_check"], input=suite.to_yaml(), capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RecipeError(f"The suite's recipes could not be checked: {lines[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["problems"]:
        raise refusal(answer["problems"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(answer["gpus"])]
    return names[: answer["gpus"]]


def recipe_problems(suite: Suite) -> list[str]:
    """Every problem of the suite's recipes, once, under the first run that has it. Takes seconds to import transformers."""
    from sbft.recipe.draft import Draft
    from sbft.recipe.problems import find_problems

    problems: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for run in possible_runs(suite):
        # All seeds and rates of a row have the same keys.
        row = (run.task, run.variant)
        if row in seen or METHODS[suite.method_of(run.variant)].missing_packages:
            continue
        seen.add(row)
        name = f"{run.task}/{run.variant}"
        for problem in find_problems(Draft(run.recipe(suite), name)):
            problems.setdefault(problem.removeprefix(f"{name}: "), problem)
    return list(problems.values())


def data_problems(suite: Suite) -> list[str]:
    """Why the data of a task cannot be read or used; read once for each model, task and phase.

    Test runs start hours after the validation runs that choose their rates: too late to learn of a misspelt file.
    """
    from sbft.data.sources import read_splits
    from sbft.recipe.pretraining import is_pretraining
    from sbft.runs.other_data import read_other_data
    from sbft.runs.token_data import load_tokens

    problems: dict[str, None] = {}
    seen: set[tuple[str, str, str, str]] = set()
    for run in possible_runs(suite):
        replay = {key: value for key, value in suite.methods[run.variant].set.items() if key.startswith("data.")}
        part = (run.model, run.task, run.phase, str(replay))
        if part in seen or METHODS[suite.method_of(run.variant)].missing_packages:
            continue
        seen.add(part)
        recipe = run.whole_recipe(suite)
        try:
            if is_pretraining(recipe.model_dump(exclude_none=True)):
                load_tokens(recipe)  # prepared here on first use, so that the first run's time does not include it
            else:
                read_other_data(recipe, read_splits(recipe.data))
        except SbftError as error:
            problems.setdefault(f"tasks.{run.task}.data: {error}")
    return list(problems)


def _main() -> None:
    gc.disable()  # this short process mostly imports, which the garbage collector would slow down
    import torch
    import yaml

    suite = Suite.model_validate(yaml.safe_load(sys.stdin.read()))
    problems = recipe_problems(suite) or data_problems(suite)
    print(json.dumps({"problems": problems, "gpus": torch.cuda.device_count()}))


if __name__ == "__main__":
    _main()
