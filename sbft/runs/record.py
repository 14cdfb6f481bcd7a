"""The record of a run, `run.json`: what was run, on what, and what came of it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sbft import files
from sbft.errors import without_secrets
from sbft.metrics import BITS_PER_BYTE

SCHEMA = 2
_READ = (1, 2)
FILE_NAME = "run.json"
_UNFINISHED_1 = "the run has not finished"
_INTERRUPTED_1 = ("Stopped by Ctrl-C", "Stopped by SIGTERM")
"""In schema 1, how the error of an unfinished run reads, and how that of an interrupted run begins."""
PACKAGES = ("sbft", "torch", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "liger-kernel")


@dataclass
class RunRecord:
    """One training run. Bytes are ints, seconds end in `_s`, figures that were not measured are None."""

    method: str
    model: str
    dataset: str
    seed: int
    status: str = "unfinished"
    """`ok`, `oom`, `error`, `unsupported` if the method needs another machine or a missing package, `interrupted` if somebody
    stopped the run, `unfinished` while it is running, or after it was killed."""
    error: str | None = None
    device: str = ""
    dtype: str = ""
    parameters: int = 0
    trainable_parameters: int = 0
    per_device_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    steps: int = 0
    skipped_steps: int = 0
    unlabelled_steps: int = 0
    """Steps of the last session that had no label to learn from."""
    tokens: int = 0
    """Tokens of the batches that were trained on, padding left out, all ranks together."""
    second_moment_half_life: float | None = None
    learning_rate: float = 0.0
    train_loss: float | None = None
    """Mean loss per step over the whole run."""
    peak_memory_bytes: int | None = None
    """Peak of the training loop alone."""
    memory_kind: str = "resident"
    """`cuda_allocated`, or `resident` on CPU."""
    memory: dict[str, int | None] = field(default_factory=dict)
    """weights, gradients, optimizer_state, baseline (held when the loop began), above_baseline, reserved_peak (CUDA),
    pool_peak (CPU: the most that tensors of 64 KiB and more, including weights, took at one time; None without a pool),
    evaluation_peak, predicted_peak; in bytes."""
    step_s: dict[str, float | None] = field(default_factory=dict)
    optimizer_s: dict[str, float | None] = field(default_factory=dict)
    tokens_per_s: float | None = None
    started_at: str | None = None
    """When the run began, UTC, ISO 8601."""
    train_s: float | None = None
    eval_s: float | None = None
    total_s: float | None = None
    """Everything from reading the data to the last measurement, all sessions of a resumed run together."""
    saved_bytes: int | None = None
    """Size of the saved weights: of the model's, or of the adapter's."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry for each logged step: step, tokens (seen until then), loss (mean since the last entry), learning_rate;
    eval_loss where the run was evaluated on its way."""
    data: dict[str, int | None] = field(default_factory=dict)
    """Counts: examples, tokens, completion_tokens, truncated, dropped (no completion left), dropped_overlap (question
    also in the evaluation), longest, packed_into, evaluation_examples; of examples and tokens, replay_examples and
    replay_tokens are of data.replay."""
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    watched: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the names of the recipe's evaluation.watch: examples, metrics_before and metrics on that data."""
    evaluated_on: str | None = None
    """`eval`, or `validation` where the recipe has no evaluation data."""
    predictions: str | None = None
    """File of the generated answers, relative to the record's folder."""
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None

    def save(self, folder: Path) -> Path:
        """Write `run.json` into a folder that exists; a reader never sees half of it."""
        path = folder / FILE_NAME
        content = _fit_to_keep({"schema": SCHEMA, **asdict(self)})
        files.write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> RunRecord:
        """Read the record in a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it has another schema.
        """
        path = Path(folder) / FILE_NAME
        return cls.of(json.loads(path.read_text(encoding="utf-8")), str(path))

    @classmethod
    def of(cls, content: dict[str, Any], source: str = "the record") -> RunRecord:
        """The record that has the content of a `run.json`; `source` is what an error calls it.

        Raises:
            ValueError: if it has another schema.
        """
        content = dict(content)
        schema = content.pop("schema", None)
        if schema not in _READ:
            raise ValueError(f"{source} has schema {schema}, expected {' or '.join(map(str, _READ))}")
        if schema == 1 and content["status"] == "error":
            error = content["error"] or ""
            if error == _UNFINISHED_1:
                content |= {"status": "unfinished", "error": None}
            elif error.startswith(_INTERRUPTED_1):
                content["status"] = "interrupted"
        return cls(**content)

    @property
    def is_result(self) -> bool:
        """Whether the run ended by itself, well or badly."""
        return self.status not in ("unfinished", "interrupted")


@dataclass(frozen=True)
class Forgetting:
    """What training has changed on data that is watched."""

    metric: str
    change: float
    """The metric after training minus that before: a loss that rises, a share of right answers that falls."""


def forgetting(record: RunRecord) -> dict[str, Forgetting]:
    """What a run has forgotten, by the names of the watched data that were measured before and after.

    The metric is the first that the recipe names for the data; else bits per byte of plain text, or the loss.
    """
    changes = {}
    for name, figures in record.watched.items():
        before, after = figures.get("metrics_before", {}), figures.get("metrics", {})
        named = record.recipe.get("evaluation", {}).get("watch", {}).get(name, {}).get("metrics", [])
        metric = next((known for known in (*named, BITS_PER_BYTE, "loss") if known in after), "loss")
        if before.get(metric) is not None and after.get(metric) is not None:
            changes[name] = Forgetting(metric, after[metric] - before[metric])
    return changes


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile (nearest rank) of durations; None each if there are none."""
    if not seconds:
        return {"median": None, "p90": None}
    ordered = sorted(seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "p90": ordered[math.ceil(0.9 * len(ordered)) - 1]}


def versions() -> dict[str, str]:
    """Versions of Python and of those installed packages that a result depends on."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return numbers


def git_commit() -> str | None:
    """Commit of the checkout that this sbft runs from, with `-dirty` if files changed; None if it is no checkout."""
    folder = Path(__file__).parent
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        # An installed sbft may be inside somebody else's repository, in its virtual environment.
        if Path(top) != folder.parent.parent:
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _fit_to_keep(value: Any) -> Any:
    """The value as JSON may keep it: None for NaN and infinities, and no passwords or tokens, which an error may quote."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: _fit_to_keep(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fit_to_keep(inner) for inner in value]
    return value
