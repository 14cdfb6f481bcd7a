"""Passes the error of one of several processes to its launcher through a file.

torchrun gives each process the name of such a file and shows its content; `sbft train --num-processes` does the same.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def leave(message: str) -> None:
    """Write down why this process fails, if the launcher asked for it."""
    file = os.environ.get(VARIABLE)
    if file is None:
        return
    try:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    except OSError:
        return  # the error may be a full disk


def left(file: Path) -> str | None:
    """What a process has written; None if nothing."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError):
        return None
