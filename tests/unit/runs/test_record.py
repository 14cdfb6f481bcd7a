"""The run record: schema 2 as other programs read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sbft.runs.card import card
from sbft.runs.record import RunRecord, git_commit, quantiles, versions

# The keys that a suite reads, as specified in the design.
KEYS = {
    "schema", "status", "error", "method", "seed", "model", "dataset", "device", "dtype", "parameters",
    "trainable_parameters", "per_device_batch_size", "gradient_accumulation_steps", "world_size", "steps", "tokens",
    "second_moment_half_life", "learning_rate", "peak_memory_bytes", "memory_kind", "memory", "step_s", "optimizer_s",
    "tokens_per_s", "train_s", "eval_s", "total_s", "saved_bytes", "history", "metrics_before", "metrics", "recipe",
    "versions", "git_commit",
}  # fmt: skip


def record(**changes: Any) -> RunRecord:
    return RunRecord(method="sbft", model="builtin:smollm2-135m", dataset="my.jsonl", seed=0, **changes)


def test_it_holds_every_key_of_schema_2_and_comes_back_as_it_was(tmp_path: Path) -> None:
    mine = record()
    mine.metrics = {"loss": 1.5}
    path = mine.save(tmp_path)
    assert not KEYS - set(json.loads(path.read_text()))
    assert RunRecord.load(tmp_path) == mine
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_nan_is_null_because_json_has_none(tmp_path: Path) -> None:
    mine = record()
    mine.metrics = {"loss": float("nan"), "perplexity": float("inf")}
    text = mine.save(tmp_path).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert RunRecord.load(tmp_path).metrics == {"loss": None, "perplexity": None}


def test_a_record_from_before_the_history_was_kept_is_read(tmp_path: Path) -> None:
    path = record().save(tmp_path)
    content = json.loads(path.read_text())
    for name in ("total_s", "saved_bytes", "history"):
        del content[name]
    path.write_text(json.dumps(content))
    old = RunRecord.load(tmp_path)
    assert (old.total_s, old.saved_bytes, old.history) == (None, None, [])


def test_a_loss_that_was_not_finite_is_null_in_the_history_too(tmp_path: Path) -> None:
    mine = record()
    mine.history = [{"step": 1, "tokens": 10, "loss": float("nan"), "learning_rate": 1e-4}]
    mine.save(tmp_path)
    assert RunRecord.load(tmp_path).history == [{"step": 1, "tokens": 10, "loss": None, "learning_rate": 1e-4}]


@pytest.mark.parametrize(
    ("error", "status", "is_result"),
    [
        ("the run has not finished", "unfinished", False),
        ("Stopped by Ctrl-C; the last checkpoint lies in x.", "interrupted", False),
        ("Stopped by SIGTERM.", "interrupted", False),
        ("ValueError: Stopped by nothing", "error", True),
    ],
)
def test_what_schema_1_told_by_its_error_is_a_status(error: str, status: str, is_result: bool, tmp_path: Path) -> None:
    path = record(status="error", error=error).save(tmp_path)
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))
    read = RunRecord.load(tmp_path)
    assert (read.status, read.is_result) == (status, is_result)
    assert read.error == (None if status == "unfinished" else error)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = record().save(tmp_path)
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(ValueError, match="schema 3, expected 1 or 2"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "median", "p90"),
    [([3.0], 3.0, 3.0), ([1.0, 2.0], 1.5, 2.0), ([float(n) for n in range(10, 0, -1)], 5.5, 9.0), ([], None, None)],
)
def test_quantiles(seconds: list[float], median: float | None, p90: float | None) -> None:
    assert quantiles(seconds) == {"median": median, "p90": p90}


def test_versions_name_what_decides_a_result() -> None:
    found = versions()
    assert {"python", "sbft", "torch", "transformers"} <= set(found)


@pytest.mark.skipif(not (Path(__file__).parents[3] / ".git").exists(), reason="not a git checkout")
def test_the_commit_is_that_of_this_checkout() -> None:
    commit = git_commit()
    assert commit is not None and len(commit.removesuffix("-dirty")) == 40


def test_the_card_states_the_figures_and_the_recipe() -> None:
    mine = record()
    mine.recipe = {"model": mine.model, "method": "sbft"}
    mine.metrics_before, mine.metrics = {"exact_match": 0.125}, {"exact_match": 0.75}
    mine.evaluated_on, mine.data = "eval", {"evaluation_examples": 40}
    mine.peak_memory_bytes, mine.tokens_per_s, mine.train_s = 3 * 2**30, 123.4, 60.0
    text = card(mine)
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "| exact_match | 0.125 | 0.75 |" in text and "3.00 GiB" in text and "method: sbft" in text
    mine.method, mine.model = "lora", "/somewhere/local"
    assert "library_name: peft" in card(mine) and "base_model" not in card(mine)
