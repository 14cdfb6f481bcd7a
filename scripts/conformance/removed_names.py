"""Stand-ins for names that a test module imports from transformers or TRL, but that the installed version no longer has.

A test that uses such a name fails, in the library's own run too, so it is left out of the comparison. Other tests of
its file remain.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


class RemovedName:
    """Raises an ImportError when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{self._name} is not in the installed version.")

    def __getattr__(self, attribute: str) -> Any:
        raise ImportError(f"{self._name} is not in the installed version.")


def stand_in_for(test_module: Path) -> list[str]:
    """Adds stand-ins for removed names that `test_module`, or a helper module beside it, imports; returns these names."""
    names = []
    for path in (test_module, *test_module.parent.glob("*test*utils.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and _is_theirs(node):
                names += _stand_in(str(node.module), [alias.name for alias in node.names])
    return names


def _is_theirs(node: ast.ImportFrom) -> bool:
    return node.level == 0 and str(node.module).split(".")[0] in ("transformers", "trl")


def _stand_in(module_name: str, names: list[str]) -> list[str]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return []
    gone = [name for name in names if name != "*" and not _has(module, name)]
    for name in gone:
        asks = name.startswith("is_") and name.endswith("_available")
        setattr(module, name, _not_available if asks else RemovedName(f"{module_name}.{name}"))
    return [f"{module_name}.{name}" for name in gone]


def _not_available(*args: Any, **kwargs: Any) -> bool:
    return False


def _has(module: Any, name: str) -> bool:
    try:
        getattr(module, name)
    except (AttributeError, ImportError, RuntimeError):
        try:
            importlib.import_module(f"{module.__name__}.{name}")
        except ImportError:
            return False
    return True
