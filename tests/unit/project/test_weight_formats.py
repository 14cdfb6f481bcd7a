"""The table of weight formats in benchmarks/README.md matches its records."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
METHODS = {"bfloat16": "sbft", "int12": "sbft-int12", "int8": "sbft-int8", "int4": "sbft-int4"}


def test_the_table_is_that_of_the_records() -> None:
    lines = (BENCHMARKS / "results" / "xeon-2-cores" / "weight-formats" / "runs.jsonl").read_text().splitlines()
    runs = {run["run"]: run["record"] for run in map(json.loads, lines)}
    assert len(runs) == 19 and all(record["status"] == "ok" for record in runs.values())
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    table = dict(
        re.findall(r"^\| (bfloat16|int\d+) \| (\d.+) \|$", page.split("## Weights in 12")[1], flags=re.MULTILINE)
    )
    assert table.keys() == METHODS.keys()
    for weights, method in METHODS.items():
        of_method = sorted(name for name in runs if name.startswith(f"needle/{method}/"))
        tests = [runs[name] for name in of_method if "/test-seed=" in name]
        searched = [runs[name] for name in of_method if "/validation-seed=" in name]  # 3e-4 is sorted before 1e-3
        right = [100 * record["metrics"]["exact_match"] for record in tests]
        loss = statistics.mean(record["metrics"]["loss"] for record in tests)
        peak = statistics.median(record["peak_memory_bytes"] for record in tests) / 2**20
        shown = [", ".join(f"{each:.1f}" for each in right), f"{statistics.mean(right):.1f}", f"{loss:.3f}"]
        shown += [", ".join(f"{100 * record['metrics']['exact_match']:.0f}" for record in searched), f"{peak:,.0f}"]
        assert table[weights] == " | ".join(shown)
