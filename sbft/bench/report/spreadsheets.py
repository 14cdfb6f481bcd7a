"""The results as CSV: one file with a row per run, one with a row per variant and task. Values are not rounded."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sbft.bench.report.comparison import Comparison, Row, SuiteRun
from sbft.bench.report.parts import NAMES, parts_of_row
from sbft.bench.report.statistics import Estimate
from sbft.bench.report.tables import front
from sbft.runs.record import forgetting

_PLAIN = (
    "dtype", "device", "parameters", "trainable_parameters", "per_device_batch_size", "gradient_accumulation_steps",
    "world_size", "steps", "skipped_steps", "tokens", "train_loss", "peak_memory_bytes", "memory_kind", "tokens_per_s",
    "train_s", "eval_s", "total_s", "saved_bytes", "evaluated_on", "git_commit",
)  # fmt: skip
_NESTED = ("memory", "step_s", "optimizer_s", "data", "metrics_before", "metrics", "versions")


def write_runs(comparison: Comparison, path: Path) -> None:
    """Write a row for every run whose learning rate is decided, made or not."""
    _write(path, [_run(row, made) for row in comparison.rows for made in (*row.searched, *row.tested)])


def write_summary(comparison: Comparison, path: Path) -> None:
    """Write a row for every variant on every task."""
    on_front = {id(row) for _, rows in comparison.groups() for row in front(rows)}
    _write(path, [_summary(comparison, row, id(row) in on_front) for row in comparison.rows])


def _run(row: Row, made: SuiteRun) -> dict[str, Any]:
    run, record = made.run, made.record
    cells: dict[str, Any] = {
        "model": run.model,
        "task": run.task,
        "variant": run.variant,
        "method": row.method,
        "phase": run.phase,
        "learning_rate": run.learning_rate,
        "chosen": run.learning_rate == row.choice.rate,
        "seed": run.seed,
        "status": "not run" if record is None else record.status,
        "error": None if record is None else record.error,
        "at_once": made.at_once,
    }
    if record is None:
        return cells
    cells |= {name: getattr(record, name) for name in _PLAIN}
    for group in _NESTED:
        cells |= {f"{group}.{name}": value for name, value in getattr(record, group).items()}
    cells |= {f"forgetting.{name}": change.change for name, change in forgetting(record).items()}
    return cells


def _summary(comparison: Comparison, row: Row, on_front: bool) -> dict[str, Any]:
    return {
        "model": row.model,
        "task": row.task,
        "variant": row.variant,
        "method": row.method,
        "state": row.shortfall or "ok",
        "learning_rate": row.choice.rate,
        "rates_tried": len(row.choice.tried),
        "edge_of_grid": row.choice.edge,
        "rate_taken_from": row.taken_from,
        "seeds_done": len(row.records),
        "seeds": len(comparison.suite.seeds),
        "metric": row.metric,
        **_estimate("score", row.score),
        **_estimate("difference", comparison.difference(row)),
        **_estimate("loss", row.loss),
        **{
            f"forgetting.{name}": fmean(change.change for change in changes) for name, changes in row.forgetting.items()
        },
        "on_pareto_front": on_front,
        "peak_memory_bytes": row.peak_bytes,
        "above_baseline_bytes": row.mean(lambda r: r.memory.get("above_baseline")),
        "evaluation_peak_bytes": row.mean(lambda r: r.memory.get("evaluation_peak")),
        **{f"{name}_bytes": value for name, value in (parts_of_row(row) or dict.fromkeys(NAMES)).items()},
        "step_s": row.median(lambda r: r.step_s.get("median")),
        "update_s": row.median(lambda r: r.optimizer_s.get("median")),
        "tokens_per_s": row.tokens_per_s,
        "train_s": row.mean(lambda r: r.train_s),
        "total_s": row.total_s,
        "trainable_parameters": row.mean(lambda r: r.trainable_parameters),
        "saved_bytes": row.mean(lambda r: r.saved_bytes),
    }


def _estimate(name: str, value: Estimate | None) -> dict[str, Any]:
    if value is None:
        return dict.fromkeys((name, f"{name}_standard_error", f"{name}_count", f"{name}_over"))
    return {
        name: value.mean,
        f"{name}_standard_error": value.standard_error,
        f"{name}_count": value.count,
        f"{name}_over": value.over,
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)
