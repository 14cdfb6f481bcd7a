"""Files that sbft itself reads and writes: the YAML that ships with it, its cache, and writes that are whole or not there.

Shell completion asks for shipped names at every key, so nothing heavy is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name beside `path`, then give it its name, replacing what was there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def cache_dir() -> Path:
    """`$SBFT_CACHE`, else `$XDG_CACHE_HOME/sbft`, else `~/.cache/sbft`; not created here."""
    if own := os.environ.get("SBFT_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "sbft"
    return Path.home() / ".cache" / "sbft"


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
