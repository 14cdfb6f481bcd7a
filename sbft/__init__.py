"""Fine-tune all weights of a language model at batch size 1, in about the memory that LoRA needs.

Everything here is imported on first use: `import sbft` loads neither torch nor transformers.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sbft.errors import SbftError as SbftError
    from sbft.optim import SGD as SGD
    from sbft.optim import Adafactor as Adafactor
    from sbft.optim import AdamW as AdamW
    from sbft.recipe import Recipe as Recipe
    from sbft.recipe import load_recipe as load_recipe
    from sbft.runs.run_recipe import run as run
    from sbft.training.arguments import SmallBatchTrainingArguments as SmallBatchTrainingArguments
    from sbft.training.promotion import small_batch as small_batch
    from sbft.training.token_count import TokenCountCallback as TokenCountCallback
    from sbft.training.trainer import SmallBatchMixin as SmallBatchMixin
    from sbft.training.trainer import SmallBatchTrainer as SmallBatchTrainer

_HOME = {
    "Adafactor": "sbft.optim",
    "AdamW": "sbft.optim",
    "SGD": "sbft.optim",
    "Recipe": "sbft.recipe",
    "load_recipe": "sbft.recipe",
    "SbftError": "sbft.errors",
    "SmallBatchMixin": "sbft.training.trainer",
    "SmallBatchTrainer": "sbft.training.trainer",
    "SmallBatchTrainingArguments": "sbft.training.arguments",
    "TokenCountCallback": "sbft.training.token_count",
    "run": "sbft.runs.run_recipe",
    "small_batch": "sbft.training.promotion",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sbft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


# Modules that were documented under another name. Their old names go with version 0.3.
_MOVED = {
    "sbft.fine_tuning": "sbft.runs.run_recipe",
    "sbft.likelihood": "sbft.evaluation.likelihood",
    "sbft.memory": "sbft.native.memory",
    "sbft.memory_pool": "sbft.native.memory_pool",
    "sbft.methods": "sbft.recipe.methods",
    "sbft.quantization": "sbft.models.quantized",
    "sbft.training.record": "sbft.runs.record",
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module by its former name, with a DeprecationWarning that tells the new one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the empty one."""
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now; the old name will go.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(new)


sys.meta_path.append(_MovedModules())
