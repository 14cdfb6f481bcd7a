"""The tables of weight formats in benchmarks/README.md and docs/results.md are those of their records."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {
    "bfloat16": "sbft",
    "int12": "sbft-int12",
    "int8": "sbft-int8",
    "int4": "sbft-int4/lr=0.001",
    "int4, rate 3e-4": "sbft-int4/lr=0.0003",
    "int4, embeddings in int8": "int4-embeddings-int8",
    "int4, batch 4": "int4-batch-4",
    "QLoRA": "qlora",
}
MIB = 2**20


def runs_on(device: str) -> dict[str, dict[str, Any]]:
    lines = (RESULTS / device / "weight-formats" / "runs.jsonl").read_text().splitlines()
    return {run["run"]: run["record"] for run in map(json.loads, lines)}


def page(name: str) -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def of(runs: dict[str, dict[str, Any]], method: str, kind: str) -> list[dict[str, Any]]:
    """Records of a method's runs, in the order of seeds or rates; with METHOD/lr=RATE, tests at that rate alone."""
    prefix = method if kind == "test" else method.partition("/")[0]
    names = [name for name in runs if name.startswith(f"needle/{prefix}/") and f"/{kind}-seed=" in name]
    return [runs[name] for name in sorted(names, key=lambda name: (runs[name]["seed"], runs[name]["learning_rate"]))]


def right(records: list[dict[str, Any]], digits: int) -> str:
    return ", ".join(f"{100 * record['metrics']['exact_match']:.{digits}f}" for record in records) or "-"


def rows_of_formats() -> list[str]:
    devices = [runs_on("xeon-2-cores"), runs_on("epyc-2-cores")]
    rows = []
    for shown, method in METHODS.items():
        tests, searched = ([of(runs, method, kind) for runs in devices] for kind in ("test", "validation"))
        both = [*tests[0], *tests[1]]
        if not both and not searched[1]:
            continue
        cells = [shown, *(right(records, 1) for records in tests)]
        cells += ["-", "-"] if not both else [
            f"{statistics.mean(100 * record['metrics']['exact_match'] for record in both):.1f}",
            f"{statistics.mean(record['metrics']['loss'] for record in both):.3f}",
        ]  # fmt: skip
        cells += [right(records, 0) for records in searched]
        peaks = [record["peak_memory_bytes"] / MIB for record in tests[1] or searched[1]]
        rows.append(f"| {' | '.join([*cells, f'{statistics.median(peaks):,.0f}' if peaks else '-'])} |")
    return rows


def rows_of_rounding() -> list[str]:
    rows = json.loads((RESULTS / "epyc-2-cores" / "rounding_cost.json").read_text())["rows"]
    shown = "| {weights} | {bytes_per_weight:.2f} | {loss:.3f} | {above_bfloat16:+.3f} |"
    return [shown.format(**row) for row in rows]


def rows_of_updates() -> list[str]:
    rows = json.loads((RESULTS / "epyc-2-cores" / "optimizer_step_grids.json").read_text())
    times = {row["optimizer"]: row["median_ms"] for row in rows}
    dense = times["sbft Adafactor, SR"]
    shown = {"bfloat16": "sbft Adafactor, SR", **{grid: f"sbft Adafactor, {grid}" for grid in ("int12", "int8", "int4")}}
    return [f"| {weights} | {times[name]:.1f} | {times[name] / dense:.2f} |" for weights, name in shown.items()]


def rows_of_steps() -> list[str]:
    rows = json.loads((RESULTS / "epyc-2-cores" / "training_step_grids.json").read_text())
    dense = {row["tokens"]: row["step_ms"] for row in rows if row["method"] == "sbft"}
    return [
        f"| `{row['method']}` | {row['tokens']} | {row['step_ms']:.0f} | {row['step_ms'] / dense[row['tokens']]:.2f} | "
        f"{row['peak_bytes'] / MIB:,.0f} |"
        for row in rows
    ]


def test_all_runs_were_finished() -> None:
    for device in ("xeon-2-cores", "epyc-2-cores"):
        runs = runs_on(device)
        assert len(runs) >= 19 and all(record["status"] == "ok" for record in runs.values())


def test_the_tables_are_those_of_the_records() -> None:
    lines = page("benchmarks/README.md")
    for rows in (rows_of_formats(), rows_of_rounding(), rows_of_updates(), rows_of_steps()):
        missing = [row for row in rows if row not in lines]
        assert len(rows) >= 4 and not missing, "\n".join(missing)
