"""Files that sbft itself reads and writes: the YAML that ships with it, its cache, and atomic writes.

Shell completion looks up shipped names at every keystroke, so nothing heavy is imported.
"""

from __future__ import annotations

import errno
import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal


def write_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Write UTF-8 text so that a reader of `path` sees either all of it or what was there before.

    Args:
        path: the file.
        text: its whole content.
        synced: wait until it is on the disk, so that this also holds after a crash of the machine.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
        if synced:
            sync(part)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or folder that replaces `path` if the block ends without an error.

    After an error or a crash, `path` is as it was. The temporary file or folder stays, and the next write finds it.

    Args:
        path: the file, or a folder that does not exist yet; the folder around it must exist.
        shared: whether other processes may write the same file at the same time. Each then gets a temporary path of its own,
            and the file there is removed if the block raises.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        if shared:
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk.

    Raises:
        OSError: if they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """`$SBFT_CACHE`, else `$XDG_CACHE_HOME/sbft`, else `~/.cache/sbft`; not created here."""
    if own := os.environ.get("SBFT_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "sbft"
    return Path.home() / ".cache" / "sbft"


Kind = Literal["recipes", "suites"]
_PACKAGE = Path(__file__).parent
_IN_CHECKOUT = {"recipes": "recipes", "suites": "benchmarks/suites"}


def shipped_names(kind: Kind) -> list[str]:
    """Names of the recipes, or of the suites, that ship with sbft."""
    return sorted(_shipped(kind))


def shipped_file(kind: Kind, name: str) -> Path:
    """The path of a shipped recipe or suite.

    Raises:
        KeyError: if there is none of that name.
    """
    return _shipped(kind)[name]


def recipe_families() -> dict[str, list[str]]:
    """Names of the recipes by the folder that they are in: "" first, for those that are in none, then one per model family."""
    families: dict[str, list[str]] = {"": []}
    folder = _folder("recipes")
    for name, path in sorted(_shipped("recipes").items(), key=lambda item: (item[1].parent, item[0])):
        family = path.parent.relative_to(folder).as_posix()
        families.setdefault("" if family == "." else family, []).append(name)
    return families


@functools.cache
def _shipped(kind: Kind) -> dict[str, Path]:
    return {path.stem: path for path in _folder(kind).rglob("*.yaml")}


def _folder(kind: Kind) -> Path:
    """In the package, where a wheel puts it; else in the checkout that the package is run from."""
    packaged = _PACKAGE / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[kind]


def summary_of_recipe(name: str) -> str:
    """What a recipe does, in one line: the second line of its file."""
    return _lines(name)[1].removeprefix("# ")


def verb_of_recipe(name: str) -> str:
    """The verb of the command that runs a recipe, `train` or `pretrain`: it is in the first line of the file."""
    return _lines(name)[0].split()[2]


def _lines(name: str) -> list[str]:
    return shipped_file("recipes", name).read_text(encoding="utf-8").splitlines()
