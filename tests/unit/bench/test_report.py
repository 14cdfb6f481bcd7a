"""Table and picture of the runs in a folder that does not belong to a suite."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from sbft.bench.report import Report, write_report
from sbft.bench.report.plain import read_records, table
from sbft.errors import DataError
from sbft.runs.record import RunRecord


def record(method: str, exact_match: float, **others: Any) -> RunRecord:
    return RunRecord(
        method=method,
        model="builtin:smollm2-135m",
        dataset="generated:some_task",
        seed=0,
        status="ok",
        device="Some CPU, 2 cores",
        parameters=134_515_008,
        trainable_parameters=134_515_008,
        learning_rate=1e-4,
        peak_memory_bytes=1 << 30,
        memory={"above_baseline": 300 << 20},
        step_s={"median": 0.4567},
        optimizer_s={"median": 0.0789},
        data={"examples": 300, "evaluation_examples": 100},
        metrics_before={"exact_match": 0.05, "loss": 3.0},
        metrics={"exact_match": exact_match, "loss": 0.25},
        evaluated_on="eval",
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        **others,
    )


def save(folder: Path, name: str, one: RunRecord) -> None:
    (folder / name).mkdir()
    one.save(folder / name)


def names(report: Report) -> list[str]:
    return [path.name for path in report.files]


def test_the_table_says_what_was_measured_with_its_standard_error(tmp_path):
    save(tmp_path, "sbft", record("sbft", 0.9))
    report = write_report(tmp_path)
    lines = [line for line in report.text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["sbft", "0.0001", "5 %", "90 % ± 3", "3.00", "0.25"] + [
        "1.00 GiB",
        "300 MiB",
        "457",
        "79",
        "134.5 of 134.5 M",
    ]
    assert len({line.count("|") for line in lines}) == 1
    assert names(report) == ["table.md", "picture.png"]
    written = report.files[0].read_text()
    assert report.text in written
    assert "Some CPU, 2 threads per run; torch 2.13.0, transformers 5.23.0" in written
    assert "measured on 100 others (eval)" in written
    assert report.files[1].read_bytes().startswith(b"\x89PNG")


def test_runs_come_in_the_order_in_which_they_were_finished(tmp_path):
    import os

    for age, name in enumerate(["third", "second", "first"]):
        save(tmp_path, name, record("sbft", 0.5))
        os.utime(tmp_path / name / "run.json", (1000 - age, 1000 - age))
    assert list(read_records(tmp_path)) == ["first", "second", "third"]


def test_a_run_that_failed_has_a_row_with_its_reason(tmp_path):
    failed = record("lora", 0.5)
    failed.status, failed.error = "oom", "Out of memory: the logits.\nMore."
    save(tmp_path, "lora", failed)
    report = write_report(tmp_path)
    assert "oom: Out of memory: the logits." in report.text
    assert "More." not in report.text
    assert names(report) == ["table.md"]


def test_a_folder_without_runs_is_an_error_that_says_what_to_type(tmp_path):
    with pytest.raises(DataError, match="sbft train RECIPE"):
        write_report(tmp_path)


def test_a_run_without_exact_match_still_has_its_row():
    one = record("sbft", 0.5)
    one.metrics, one.metrics_before = {"loss": 1.25}, {}
    assert "1.25" in table({"run": one}).markdown()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("name", "above"), [("run", None), ("run", 0), ("a" * 120, 1 << 20)])
def test_a_run_with_a_long_name_or_no_memory_of_its_own_is_drawn_without_a_warning(name, above, tmp_path):
    one = record("sbft", 0.5)
    one.memory = {"above_baseline": above}
    save(tmp_path, name, one)
    assert names(write_report(tmp_path)) == ["table.md", "picture.png"]


def test_without_matplotlib_the_table_is_written_and_the_warning_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    save(tmp_path, "sbft", record("sbft", 0.9))
    report = write_report(tmp_path)
    assert names(report) == ["table.md"] and report.files[0].exists()
    assert report.warning is not None and "Type: " in report.warning


def test_the_table_says_what_was_forgotten(tmp_path: Path) -> None:
    before, after = {"loss": 2.0, "bits_per_byte": 0.9}, {"loss": 2.5, "bits_per_byte": 1.15}
    watched = {"english": {"metrics_before": before, "metrics": after}}
    save(tmp_path, "lora", record("lora", 0.9))
    save(tmp_path, "sbft", record("sbft", 0.9, watched=watched))
    report = write_report(tmp_path)
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in report.text.splitlines() if line[:1] == "|"
    ]
    assert head[-1] == "forgetting of english"
    assert {row[0]: row[-1] for row in rows} == {"lora": "", "sbft": "+0.250 bits per byte"}
    assert "Forgetting: the metric after training minus that before" in report.text
