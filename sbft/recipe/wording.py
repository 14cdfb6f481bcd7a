"""How a message quotes a value that somebody typed, and names the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from sbft.errors import without_secrets

_LONGEST = 200


def shown(value: Any) -> str:
    """What Python writes for it, cut where it is long, in characters that every terminal has a way to print."""
    try:
        text = without_secrets(repr(value))
    except ValueError:
        return "a number of too many digits"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that names what is most like `name`; empty where nothing is."""
    near = closest(name, names)
    return f"; the nearest is {near}" if near else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """What is most like `name`, or None where nothing is."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return near[0] if near else None
