"""A suite's finished runs in one file, `runs.jsonl`, kept beside the tables that were made from them.

It has one line per run, sorted by name: `{"run": NAME, "process": {...}, "record": {...}}`. The name is the run's folder
below `runs`. The record is the whole content of its `run.json`, and the process that of its `process.json`.
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
"""A run's process: its duration from start to end, how it ended, how many runs ran at the same time, and on what."""


@dataclass(frozen=True)
class ArchivedRun:
    """One line of an archive."""

    record: RunRecord
    process: dict[str, Any]
    """Empty where the run was not made by the runner."""


def archived_runs(folder: Path) -> dict[str, ArchivedRun]:
    """The runs in the archive of a suite's folder, by name; empty where there is no archive.

    Raises:
        DataError: if a line does not describe a run.
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
                raise DataError(f"Line {number} of {path} does not describe a run: {error!r}") from error
    return runs


def archive_runs(runs: Path, to: Path) -> int:
    """Write the finished runs below a folder into one file, without their answers, logs and models.

    Args:
        runs: the folder that contains the runs' folders, at any depth: `runs` in a suite's folder.
        to: the file to write.

    Returns:
        The number of runs written.

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
