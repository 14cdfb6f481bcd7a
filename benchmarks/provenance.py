"""What every record of a benchmark carries: the command, the commit, the date, and the versions that it was made with."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

KEYS = ("command", "git_commit", "date", "versions")


def provenance() -> dict[str, Any]:
    """`KEYS` of this process; the commit is None outside of a checkout, and ends in `-dirty` where files differ from it."""
    from sbft.runs.record import git_commit, versions

    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return {
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def commits(rows: list[dict[str, Any]]) -> set[str]:
    """The commits of a table's records, "unknown" for those that carry none."""
    return {row.get("git_commit") or "unknown" for row in rows}
