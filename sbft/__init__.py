"""Fine-tune all weights of a language model at batch size 1, in about the memory that LoRA needs.

Everything here is imported on first use: `import sbft` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sbft.errors import SbftError as SbftError
    from sbft.fine_tuning import run as run
    from sbft.optim import SGD as SGD
    from sbft.optim import Adafactor as Adafactor
    from sbft.optim import AdamW as AdamW
    from sbft.recipe import Recipe as Recipe
    from sbft.recipe import load_recipe as load_recipe
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
    "run": "sbft.fine_tuning",
    "small_batch": "sbft.training.promotion",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sbft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
