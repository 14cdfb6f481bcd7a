"""The recipe that a verb's arguments describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sbft.cli.shared.starting import starting

if TYPE_CHECKING:
    from pathlib import Path

    from sbft.recipe import Recipe


def recipe_of(
    source: str | Path | None, overrides: list[str] | None = None, *, pretraining: bool = False, **flags: Any
) -> Recipe:
    """Load and resolve a recipe.

    Args:
        source: a YAML file, or the name of a recipe that ships with sbft; None if the flags describe it completely.
        overrides: `KEY=VALUE`, as `--set` takes them.
        pretraining: fill in the defaults of pretraining.
        **flags: what is given instead of a recipe, as for `sbft.recipe.load_recipe`; None if it was not typed.

    Raises:
        RecipeError: if the recipe is not valid.
    """
    with starting():
        from sbft.recipe import for_pretraining, load_recipe, resolve
    recipe = load_recipe(source, overrides, **flags)
    return resolve(for_pretraining(recipe) if pretraining else recipe)
