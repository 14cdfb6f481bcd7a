"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A sign that a run will go wrong, or a harmless note about it."""

    key: str
    """Its name, for machines."""
    severity: Severity
    """error: the run cannot start, or will fail; warning: it will do worse than it could; note: harmless."""
    title: str
    why: str
    """A sentence or two on what this does to the run."""
    fix: str | None = None
    """What to do: flags of `sbft train` where these are enough; None where there is nothing to fix."""
