"""Models and tokenizers: by name, from files, with random weights, or in 4 bits.

`load_model`, `load_tokenizer`, `load_config` and `resolve` are imported on first use, so that `sbft.models.hub` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sbft.models.load import load_config as load_config
    from sbft.models.load import load_model as load_model
    from sbft.models.load import load_tokenizer as load_tokenizer
    from sbft.models.names import resolve as resolve

_HOME = {
    "load_config": "sbft.models.load",
    "load_model": "sbft.models.load",
    "load_tokenizer": "sbft.models.load",
    "resolve": "sbft.models.names",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sbft.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
