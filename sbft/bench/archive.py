"""A suite's finished runs in one file, `runs.jsonl`, as results are kept beside the tables that were made from them.

One line a run, sorted by name: `{"run": NAME, "process": {...}, "record": {...}}`, where the name is the run's folder below
`runs`, the record is the content of its `run.json` and the process that of its `process.json`, both whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sbft import files
from sbft.errors import DataError
from sbft.runs.record import FILE_NAME, RunRecord

ARCHIVE_FILE = "runs.jsonl"
PROCESS_FILE = "process.json"
"""How long the process of a run took, from its start to its end, how it ended, how many ran at once, and on what."""


@dataclass(frozen=True)
class ArchivedRun:
    """One line of an archive."""

    record: RunRecord
    process: dict[str, Any]
    """Empty where the run was made by hand."""


def archived_runs(folder: Path) -> dict[str, ArchivedRun]:
    """The runs in the archive of a suite's folder by name; none where there is no archive.

    Raises:
        DataError: if a line is not that of a run.
    """
    path = folder / ARCHIVE_FILE
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> dict[str, ArchivedRun]:
    runs = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                content = json.loads(line)
                runs[content["run"]] = ArchivedRun(RunRecord.of(content["record"]), content["process"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"Line {number} of {path} is not that of a run: {error!r}") from error
    return runs


def archive_runs(runs: Path, to: Path) -> int:
    """Write the finished runs below a folder into one file; their answers, logs and models stay behind.

    Args:
        runs: the folder that holds the runs' folders, at any depth: `runs` in that of a suite.
        to: the file to write.

    Returns:
        How many runs are in it.

    Raises:
        DataError: if there is no finished run.
    """
    lines = []
    for path in sorted(runs.rglob(FILE_NAME), key=lambda path: path.parent.relative_to(runs).as_posix()):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not RunRecord.of(record, str(path)).is_result:
            continue
        process = path.with_name(PROCESS_FILE)
        facts = json.loads(process.read_text(encoding="utf-8")) if process.is_file() else {}
        name = path.parent.relative_to(runs).as_posix()
        lines.append(json.dumps({"run": name, "process": facts, "record": record}, separators=(",", ":")) + "\n")
    if not lines:
        raise DataError(f"There is no finished run below {runs}: expected {runs}/NAME/{FILE_NAME}.")
    files.write_text(to, "".join(lines))
    return len(lines)
