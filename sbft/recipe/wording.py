"""Quotes typed values in messages, and suggests the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from sbft.errors import without_secrets

_LONGEST = 200


def shown(value: Any) -> str:
    """A value's `repr`, shortened if it is long, in characters that every terminal can print."""
    try:
        text = without_secrets(repr(value))
    except ValueError:
        return "a number of too many digits"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that suggests the name most similar to `name`; empty if none is similar."""
    near = closest(name, names)
    return f"; the nearest is {near}" if near else ""


def closest(name: str, names: Iterable[str]) -> str | None:
    """The name most similar to `name`; None if none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return near[0] if near else None
