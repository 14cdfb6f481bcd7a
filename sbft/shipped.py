"""The YAML files that ship with sbft, by name. Shell completion asks for them at every key: nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["recipes", "suites"]
_FOLDER = Path(__file__).parent


def shipped_names(kind: Kind) -> list[str]:
    """Names of the recipes, or of the suites, that ship with sbft."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.yaml"))


def shipped_file(kind: Kind, name: str) -> Path:
    """The file of one of them."""
    return _FOLDER / kind / f"{name}.yaml"


def summary_of_recipe(name: str) -> str:
    """What a recipe does, in a line: the second of its file."""
    return _lines(name)[1].removeprefix("# ")


def verb_of_recipe(name: str) -> str:
    """The verb of the command that runs a recipe, `train` or `pretrain`: the first line of its file holds it."""
    return _lines(name)[0].split()[2]


def _lines(name: str) -> list[str]:
    return shipped_file("recipes", name).read_text(encoding="utf-8").splitlines()
