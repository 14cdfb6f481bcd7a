"""The recipe, which describes one run.

Everything here is imported on first use: shells ask for names of methods at every key press, and the schema is slow to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sbft.recipe.brief import in_brief as in_brief
    from sbft.recipe.draft import recipe_names as recipe_names
    from sbft.recipe.draft import recipe_text as recipe_text
    from sbft.recipe.loading import for_pretraining as for_pretraining
    from sbft.recipe.loading import load_recipe as load_recipe
    from sbft.recipe.loading import resolve as resolve
    from sbft.recipe.schema import DataConfig as DataConfig
    from sbft.recipe.schema import EvaluationConfig as EvaluationConfig
    from sbft.recipe.schema import LoraConfig as LoraConfig
    from sbft.recipe.schema import OptimizerConfig as OptimizerConfig
    from sbft.recipe.schema import Recipe as Recipe

_HOME = {
    "DataConfig": "schema",
    "EvaluationConfig": "schema",
    "LoraConfig": "schema",
    "OptimizerConfig": "schema",
    "Recipe": "schema",
    "for_pretraining": "loading",
    "in_brief": "brief",
    "load_recipe": "loading",
    "recipe_names": "draft",
    "recipe_text": "draft",
    "resolve": "loading",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sbft.recipe' has no attribute {name!r}")
    return getattr(import_module(f"sbft.recipe.{_HOME[name]}"), name)
