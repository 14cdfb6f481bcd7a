"""`sbft check`: what it prints, its exit codes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.cli.check import _to_type

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(12)]


@pytest.fixture(autouse=True)
def no_note_of_an_idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These examples have too few tokens to keep a GPU busy, which is not the subject of these tests."""
    monkeypatch.setattr("sbft.planning.check.settings.COMPUTE_BOUND_GPU_TOKENS", 0)


@pytest.fixture
def recipe(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file in the working folder, with nothing wrong in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {tiny_dir}\ndata: {{train: train.jsonl}}\n")
    return path


def sbft_check(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_clean_recipe_is_summed_up_with_exit_code_0(recipe: Path, tmp_path: Path) -> None:
    before = entries(tmp_path)
    code, out, _ = sbft_check(recipe)
    assert code == 0, out
    told = {line.split(maxsplit=1)[0]: line for line in out.splitlines() if line and not line.startswith(" ")}
    assert "12 examples" in told["data"] and "12 steps on 12 examples" in told["run"] and "1 epoch" in told["run"]
    assert " GiB, predicted" in told["memory"] and "unknown" in told["time"] and "bfloat16" in told["model"]
    assert "Notes: 1" in out and "Harmless" in out and "Warnings" not in out and out.endswith("Nothing is wrong.\n")
    assert entries(tmp_path) == before


def test_warnings_are_told_with_what_mends_them_and_exit_code_1(recipe: Path) -> None:
    code, out, _ = sbft_check(
        *(recipe, "--set", "optimizer.stochastic_rounding=false", "--set", "optimizer.beta2=0.95"),
        *("--set", "data.max_length=20", "--set", "training.warmup_steps=3"),
    )
    assert code == 1 and "Warnings: 4\n" in out
    lines = out.splitlines()
    assert "  fix: --set optimizer.stochastic_rounding=true" in lines
    flags = "--set optimizer.beta2=null --set optimizer.second_moment_half_life=221000"
    assert f"  fix: {flags}" in lines
    # Too long for one line: broken as a shell reads it.
    first, second, third = _to_type(f"--method adam {flags}", "  fix: ").splitlines()
    assert first == "  fix: --method adam \\" and second == "       --set optimizer.beta2=null \\"
    assert third == "       --set optimizer.second_moment_half_life=221000"
    assert "sbft train would print this and continue." in out


def test_what_it_prints_fits_80_columns(recipe: Path) -> None:
    for method in ("sbft", "adam-accum", "hf-adafactor", "lora"):
        warm = ("--set", "training.warmup_steps=30", "--set", "training.lr_scheduler_type=linear")
        _, out, _ = sbft_check(recipe, "--method", method, *warm, "--set", "data.max_length=20")
        long = [line for line in out.splitlines() if len(line) > 80]
        assert not [line for line in long if " " in line.strip()]


def test_a_run_that_does_not_fit_is_exit_code_2(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.planning.check.check_recipe.available_bytes", lambda: 1)
    code, out, _ = sbft_check(recipe)
    assert code == 2 and "Errors: 1" in out and "It will not fit into memory" in out and "  fix: " in out


def test_all_problems_of_a_recipe_are_told_with_exit_code_2(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "methd: sbft\ntraining: {learning_rat: 1}\n")
    code, out, err = sbft_check(recipe)
    assert (code, out) == (2, "") and "2 problems" in err and "methd" in err and "learning_rat" in err


def test_data_that_cannot_be_read_is_a_paragraph_and_exit_code_2(recipe: Path) -> None:
    code, out, err = sbft_check(recipe, "--eval-data", "train.jsonl")
    assert (code, out) == (2, "") and err.startswith("Error: ") and "shares 12 questions" in err
    code, out, _ = sbft_check(recipe, "--eval-data", "train.jsonl", "--json")
    assert code == 2 and "shares 12 questions" in json.loads(out)["problems"]


def test_json_has_all_of_it(recipe: Path) -> None:
    code, out, _ = sbft_check(recipe, "--method", "adam-accum", "--json")
    told: dict[str, Any] = json.loads(out)
    assert code == 1 and told["valid"] and told["exit_code"] == 1
    assert told["run"]["steps"] == 1 and told["run"]["rows"] == 12 and told["data"]["examples"] == 12
    assert told["memory"]["predicted_peak_bytes"] > 0 and told["memory"]["available_bytes"] > 0
    (found,) = told["findings"]
    assert (found["key"], found["severity"], found["fix"]) == (
        "accumulation-on-one-device",
        "warning",
        "--method adam",
    )


def test_a_process_of_its_own(recipe: Path) -> None:
    command = [sys.executable, "-m", "sbft", "check", str(recipe), "--set", "optimizer.stochastic_rounding=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "" and "bfloat16 weights without stochastic rounding" in done.stdout
