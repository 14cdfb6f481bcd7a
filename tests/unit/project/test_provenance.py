"""Every committed benchmark record says which code produced it, or is listed among those that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.provenance import KEYS, commits, provenance
from sbft.bench.archive import archived_runs

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
LAB = ROOT / "benchmarks" / "lab" / "results"
WITHOUT = RESULTS / "without_commit.json"
SEVERAL = "of several commits"
# Each table's section, from its heading on, and the folder of its runs.
PAPER, ABLATIONS = (RESULTS / "xeon-2-cores" / name for name in ("paper-table", "ablations"))
TABLES = [
    ("docs/results.md", "## Accuracy and memory", PAPER),
    ("docs/results.md", "## What each part is worth", ABLATIONS),
    ("benchmarks/README.md", "## The paper's table", PAPER),
    ("benchmarks/README.md", "## Ablations", ABLATIONS),
    ("benchmarks/lab/README.md", "## What these runs can show", LAB / "xeon-2-cores-cpu"),
    ("benchmarks/lab/README.md", "## What these runs can show", LAB / "xeon-2-cores-short"),
    ("benchmarks/lab/README.md", "## What these runs can show", LAB / "h100-small"),
]


def records_in(content: Any) -> Iterator[dict[str, Any]]:
    for one in content if isinstance(content, list) else [content]:
        yield {**one, **one["run"]} if isinstance(one.get("run"), dict) else one


def test_a_record_carries_its_commit_or_is_named_among_those_without() -> None:
    known = json.loads(WITHOUT.read_text(encoding="utf-8"))
    paths = [path for path in sorted(RESULTS.rglob("*.json")) if path != WITHOUT]
    lacking = {
        path.relative_to(RESULTS).as_posix()
        for path in paths
        if "unknown" in commits(list(records_in(json.loads(path.read_text(encoding="utf-8")))))
    }
    assert len(paths) > len(lacking)
    assert lacking == set(known)
    assert all(len(one["committed_in"]) == 7 and one["date"].startswith("2026-") for one in known.values())


@pytest.mark.parametrize(("name", "heading", "folder"), TABLES)
def test_a_table_of_runs_of_several_commits_says_so(name: str, heading: str, folder: Path) -> None:
    rows = [{"git_commit": run.record.git_commit} for run in archived_runs(folder).values()]
    assert rows
    section = (ROOT / name).read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    assert (SEVERAL in " ".join(section.split())) == (len(commits(rows)) > 1)


def test_what_a_script_writes_beside_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "optimizer_step.py"), "--model", "4096 x"])
    made = provenance()
    assert tuple(made) == KEYS
    assert made["command"] == "python benchmarks/optimizer_step.py --model '4096 x'"
    assert made["versions"]["torch"] and made["date"].endswith("+00:00")
    assert commits([{"git_commit": "a"}, {}, {"git_commit": None}]) == {"a", "unknown"}
