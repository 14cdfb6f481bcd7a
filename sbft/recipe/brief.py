"""A recipe in brief: the settings that differ from its method's defaults."""

from __future__ import annotations

from typing import Any

from sbft.recipe.defaults import complete
from sbft.recipe.schema import Recipe, as_yaml


def in_brief(recipe: Recipe) -> str:
    """A resolved recipe as YAML, without the settings that are its method's defaults.

    Model, method, training data and output folder are always included. Resolving the result gives the same recipe.
    """
    named: dict[str, Any] = {"model": recipe.model, "method": recipe.method, "data": {"train": recipe.data.train}}
    default = _dumped(Recipe.model_validate(complete(named)))
    whole = _dumped(recipe)
    brief: dict[str, Any] = {}
    for key, value in whole.items():
        if isinstance(value, dict):
            usual = default.get(key) or {}
            kept = {name: inner for name, inner in value.items() if name not in usual or usual[name] != inner}
            brief[key] = named.get(key, {}) | kept
            if not brief[key]:
                del brief[key]
        elif key in named or key == "output_dir" or value != default.get(key):
            brief[key] = value
    return as_yaml(brief)


def _dumped(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)
