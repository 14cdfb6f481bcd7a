"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A sign of a run that goes wrong, or a note on one that does not."""

    key: str
    """Its name, for machines."""
    severity: Severity
    """error: the run cannot begin, or will not end well; warning: it will be worse than it could be; note: harmless."""
    title: str
    why: str
    """A sentence or two on what it does to the run."""
    mend: str | None = None
    """What to type, flags of `sbft train` where these do it; None where nothing needs mending."""
