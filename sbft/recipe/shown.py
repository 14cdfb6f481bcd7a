"""A value of a recipe as an error message shows it."""

from __future__ import annotations

from typing import Any

from sbft.redaction import without_secrets

_LONGEST = 200


def shown(value: Any) -> str:
    """What Python writes for it, cut where it is long, in characters that every terminal has a way to print."""
    try:
        text = without_secrets(repr(value))
    except ValueError:
        return "a number of too many digits"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
