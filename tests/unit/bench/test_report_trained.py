"""The report of a suite whose runs have really been trained: two methods at two rates, on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sbft.bench.report import export_peft_json, write_report
from sbft.bench.report.comparison import Comparison, compare
from sbft.bench.report.parts import parts_of
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, run_folder, validation_runs
from sbft.recipe import Recipe
from sbft.runs.run_recipe import run
from tests.unit.bench.report_cases import decided_runs, store

pytestmark = pytest.mark.slow


def questions(path: Path, first: int, count: int) -> str:
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(suite: Suite, folder: Path, one: Run) -> None:
    content = {**one.recipe(suite), "output_dir": str(run_folder(folder, one))}
    run(Recipe.model_validate(content))


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    files = tmp_path_factory.mktemp("data")
    folder = tmp_path_factory.mktemp("suite")
    task = {
        "data": {
            "train": questions(files / "train.jsonl", 0, 24),
            "validation": questions(files / "validation.jsonl", 100, 4),
            "eval": questions(files / "eval.jsonl", 200, 6),
            "max_length": 64,
        },
        "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 4, "before": False},
    }
    suite = Suite.model_validate(
        {
            "models": [str(tiny_dir)],
            "tasks": {"plus-one": task},
            "methods": {"lora": {"learning_rates": [1e-4, 1e-2]}, "sbft": {"learning_rates": [1e-4, 1e-2]}},
            "training": {"logging_steps": 4},
        }
    )
    store(suite, folder)
    for one in validation_runs(suite):
        train(suite, folder, one)
    for one in decided_runs(suite, folder):
        train(suite, folder, one)
    return compare(suite, folder)


def test_everything_is_written_from_what_training_leaves(trained: Comparison) -> None:
    report = write_report(trained.folder)
    assert report.warning is None and all(path.stat().st_size > 0 for path in report.files)
    assert {path.name for path in report.files} == {
        "report.md", "report.html", "runs.csv", "summary.csv", "accuracy-memory.png", "memory-parts.png",
        "learning-rates.png", "training-loss.png",
    }  # fmt: skip
    text = (trained.folder / "report.md").read_text()
    assert (
        "6 runs done." in text
        and "plus-one: exact match and loss on 6 items (eval) after training on 24 examples" in text
    )
    assert text.count("One seed: paired over the evaluation items") == 1


def test_the_figures_are_those_of_the_records(trained: Comparison) -> None:
    write_report(trained.folder)
    with (trained.folder / "runs.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 6 and {row["status"] for row in rows} == {"ok"}
    for row in trained.rows:
        record = row.records[0]
        found = next(line for line in rows if line["phase"] == "test" and line["variant"] == row.variant)
        assert float(found["metrics.loss"]) == record.metrics["loss"]
        assert int(found["saved_bytes"]) == record.saved_bytes and record.saved_bytes
        assert row.loss is not None and row.loss.mean == record.metrics["loss"]
        losses = {made.run.learning_rate: made.ok.metrics["loss"] for made in row.searched if made.ok}
        scores = {made.run.learning_rate: made.ok.metrics["exact_match"] for made in row.searched if made.ok}
        assert row.choice.rate == max(scores, key=lambda rate: (scores[rate], -losses[rate]))


def test_the_parts_of_real_memory_add_up(trained: Comparison) -> None:
    for row in trained.rows:
        record = row.records[0]
        parts = parts_of(record, row.is_adapter)
        assert parts is not None and sum(parts.values()) == record.peak_memory_bytes
        assert min(parts.values()) >= 0 and (parts["adapters"] > 0) == (row.variant == "lora")


def test_real_records_fit_the_schema_of_pefts_comparison(trained: Comparison, tmp_path: Path) -> None:
    lora, sbft = (json.loads(path.read_text()) for path in export_peft_json(trained.folder, tmp_path / "out"))
    assert lora["run_info"]["peft_config"]["r"] == 16 and sbft["run_info"]["peft_config"] is None
    assert lora["train_info"]["num_trainable_params"] < sbft["train_info"]["num_trainable_params"]
    for content in (lora, sbft):
        last = content["train_info"]["metrics"][-1]
        assert last["train samples"] == 24 and last["train loss"] > 0 and last["train total tokens"] > 24
        assert content["run_info"]["total_time"] > content["train_info"]["train_time"] > 0
