"""The outcome of a run's process: its record, also where the process could not write one."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from sbft.bench.active_run import Active
from sbft.bench.archive import PROCESS_FILE
from sbft.bench.process import log_beside, recipe_beside
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import (
    LOG_FILE,
    RECIPE_FILE,
    Run,
    run_folder,
    stored_record,
)
from sbft.errors import Interrupted, how_to_install
from sbft.recipe.methods import METHODS
from sbft.runs.record import FILE_NAME, RunRecord, git_commit, versions
from sbft.training.checkpointing.checkpoints import remove_checkpoints

_WEIGHTS = ("*.safetensors", "*.bin")
# What is useful without the weights. There are tensorboard events where the suite asks for them.
_KEPT = (FILE_NAME, RECIPE_FILE, LOG_FILE, PROCESS_FILE, "*.jsonl", "events.out.*")
_LAST_LINES = 3


def missing_package(suite: Suite, variant: str) -> str | None:
    """Why a variant cannot be run here, if a package that its method needs is not installed."""
    name = suite.method_of(variant)
    method = METHODS[name]
    for package in method.missing_packages:
        install = how_to_install(f"'sbft[{method.packages[package]}]'")
        return f"Method {name} needs the package {package}, which is not installed. {install}"
    return None


def write_unsupported(suite: Suite, folder: Path, run: Run, reason: str) -> RunRecord:
    """Write the record of a run that this machine cannot make."""
    return write_failure(suite, folder, run, "unsupported", reason)


def write_failure(suite: Suite, folder: Path, run: Run, status: str, reason: str) -> RunRecord:
    """Write the record of a run of which only the reason for its failure is known."""
    record = _blank(suite, run)
    record.status, record.error = status, reason
    target = run_folder(folder, run)
    target.mkdir(parents=True, exist_ok=True)
    record.save(target)
    return record


def conclude(suite: Suite, active: Active) -> RunRecord | None:
    """The record of a run whose process has ended; None if it was stopped from outside, so that it has to be made again.

    The process's output becomes the log in the run's folder, and the weights are removed unless the suite keeps them.

    Args:
        suite: what the run belongs to.
        active: the run.
    """
    record = stored_record(active.folder)
    if record is None or record.status != "ok":
        record = record or _blank(suite, active.run)
        if active.timed_out:
            # What it measured before stays in the record.
            record.status, record.error = "error", f"timed out after {active.time_limit_s:g} s"
        elif record.status == "unfinished":
            record.status, record.error = _how_it_ended(active.exit_code or 0, log_beside(active.folder))
        active.folder.mkdir(parents=True, exist_ok=True)
        record.save(active.folder)
        if not record.is_result:
            return None
    process = {
        "elapsed_s": round(active.elapsed_s, 3),
        "exit_code": active.exit_code,
        "at_once": active.at_once,
        "cores": active.cores,
    }
    (active.folder / PROCESS_FILE).write_text(json.dumps(process) + "\n", encoding="utf-8")
    return tidy(suite, active.folder)


def tidy(suite: Suite, folder: Path) -> RunRecord | None:
    """Bring the folder of a finished run into its final state, unless that is already done."""
    record = stored_record(folder)
    if record is None:
        return None
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if weights and record.saved_bytes is None:
        record.saved_bytes = sum(path.stat().st_size for path in weights)
        record.save(folder)
    if not suite.keep_models:
        for path in folder.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in _KEPT):
                path.unlink()
    remove_checkpoints(folder)
    recipe_beside(folder).unlink(missing_ok=True)
    # Last: as long as the log is beside the folder, the next runner knows that this run still has to be tidied.
    if log_beside(folder).exists():
        os.replace(log_beside(folder), folder / LOG_FILE)
    return record


def _blank(suite: Suite, run: Run) -> RunRecord:
    """A record that says what was to be run, without any result."""
    recipe = run.whole_recipe(suite)
    training = recipe.training
    return RunRecord(
        method=recipe.method,
        model=recipe.model,
        dataset=recipe.data.train,
        seed=run.seed,
        dtype=str(recipe.dtype),
        per_device_batch_size=training["per_device_train_batch_size"],
        gradient_accumulation_steps=training["gradient_accumulation_steps"],
        second_moment_half_life=recipe.optimizer.second_moment_half_life,
        learning_rate=run.learning_rate,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        git_commit=git_commit(),
    )


def _how_it_ended(code: int, log: Path) -> tuple[str, str]:
    """Status and error of a process that did not record them itself."""
    if code == -signal.SIGKILL:
        return "oom", (
            "The system ended the process (signal 9), as it does when the machine's memory runs out. End other programs, "
            "make fewer runs at a time (--jobs 1), or use a smaller model."
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        # Interrupted while loading. A run that exceeded its time limit does not get here.
        if code in (-number, Interrupted(number).exit_code):
            return "interrupted", str(Interrupted(number))
    if code < 0:
        return "error", f"The process was ended by {signal.Signals(-code).name}.{_last_lines(log)}"
    if paragraph := _error_paragraph(log):
        return "error", paragraph
    return "error", f"The process ended with exit code {code} and no finished record.{_last_lines(log)}"


def _error_paragraph(log: Path) -> str | None:
    """The last paragraph of the log that begins with `Error:`, without that word."""
    paragraphs = re.findall(r"^Error: (.+?)(?=\n\s*\n|\Z)", _text(log), re.MULTILINE | re.DOTALL)
    return paragraphs[-1].strip() if paragraphs else None


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    return f" The end of its log: {' / '.join(lines[-_LAST_LINES:])}" if lines else ""


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
