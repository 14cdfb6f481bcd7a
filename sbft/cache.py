"""Where sbft keeps what it can make again: converted models and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$SBFT_CACHE`, else `$XDG_CACHE_HOME/sbft`, else `~/.cache/sbft`; not created here."""
    if own := os.environ.get("SBFT_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "sbft"
    return Path.home() / ".cache" / "sbft"
