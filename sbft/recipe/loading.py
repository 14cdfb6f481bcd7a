"""Reads and checks recipes, and completes them with their method's defaults.

A recipe file has only what differs from the method's defaults. `load_recipe` reports every problem; `resolve` makes the
complete recipe, which a run saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbft.errors import RecipeError
from sbft.recipe.defaults import complete
from sbft.recipe.draft import Draft
from sbft.recipe.pretraining import is_pretraining, with_defaults
from sbft.recipe.problems import find_problems
from sbft.recipe.schema import Recipe


def load_recipe(source: str | Path | None = None, overrides: list[str] | None = None, **flags: Any) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        source: a YAML file, the name of a recipe that ships with sbft, or None for one given by flags alone.
        overrides: `a.b=c` each, with the value in YAML; they take precedence over file and flags.
        **flags: `model`, `method`, `data`, `eval_data`, `output_dir`; they take precedence over the file. None: not given.

    Returns:
        The recipe as written, without the method's defaults: see `resolve`.

    Raises:
        RecipeError: if it has problems. The message lists all of them, with file and line, key, what was expected, and the
            nearest valid key.
    """
    draft = Draft.read(source) if source is not None else Draft({}, name="recipe")
    draft.apply_flags(flags)
    draft.apply_overrides(overrides or [])
    draft.read_no_as_a_word()
    _refuse(draft)
    return Recipe.model_validate(draft.content)


def resolve(recipe: Recipe) -> Recipe:
    """Complete a recipe with its method's defaults.

    Raises:
        RecipeError: if settings are wrong or contradict one another; the message lists every problem.
    """
    draft = Draft(recipe.model_dump(exclude_unset=True), name="recipe")
    _refuse(draft)
    return Recipe.model_validate(complete(draft.content))


def for_pretraining(recipe: Recipe) -> Recipe:
    """Complete a recipe with the defaults of pretraining; see `sbft.recipe.pretraining.PRETRAINING`.

    Raises:
        RecipeError: if it is not a recipe of pretraining.
    """
    content = recipe.model_dump(exclude_unset=True)
    if not is_pretraining(content):
        raise RecipeError(
            f"This recipe trains {recipe.model} on the examples of {recipe.data.train}, which is not pretraining. Type sbft "
            "train instead of sbft pretrain; or, to learn every token of a text, write model: scratch:1m for a new model, or "
            "data.train_tokens for the number of tokens to train a checkpoint on."
        )
    draft = Draft(with_defaults(content), name="recipe")
    _refuse(draft)
    return Recipe.model_validate(draft.content)


def _refuse(draft: Draft) -> None:
    problems = find_problems(draft)
    if len(problems) == 1:
        raise RecipeError(problems[0])
    if problems:
        raise RecipeError("\n".join([f"{len(problems)} problems in the recipe:", *(f"- {p}" for p in problems)]))
