"""The nearest right name to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that names what is most like `name`; empty where nothing is."""
    near = closest(name, names)
    return f"; the nearest is {near}" if near else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """What is most like `name`, or None where nothing is."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return near[0] if near else None
