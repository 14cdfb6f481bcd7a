"""`sbft bench`: suites that really train a tiny model, stopped in every way and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from sbft.bench.live import SuiteProgress
from sbft.bench.outcome import conclude, write_unsupported
from sbft.bench.process import ActiveProcess, held_locks, log_beside, try_lock
from sbft.bench.rate_choice import RateChoice, choose_rate
from sbft.bench.runner import prepare, run_suite
from sbft.bench.schedule import plan
from sbft.bench.suite import Suite, load_suite
from sbft.bench.suite_runs import Run, possible_runs, read_run, run_folder, stored_record, stored_suite
from sbft.cli.app import app
from sbft.recipe.methods import METHODS

PATIENCE_S = 120


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> dict[str, Any]:
    """A suite of four runs: sbft searches over two rates, lora has one."""
    folder = tmp_path_factory.mktemp("data")
    for part, numbers in (("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 22))):
        rows = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in numbers]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "summary": "Sums.",
        "models": [str(tiny_dir)],
        "tasks": {
            "sums": {
                "data": {
                    "train": str(folder / "train.jsonl"),
                    "validation": str(folder / "validation.jsonl"),
                    "eval": str(folder / "test.jsonl"),
                    "max_length": 64,
                },
                "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 4, "before": False},
            }
        },
        "methods": {"lora": {"learning_rates": [1e-2]}, "sbft": {"learning_rates": [1e-3, 1e-2]}},
    }


def suite_of(content: dict[str, Any], *methods: str, **changes: Any) -> Suite:
    kept = {name: content["methods"][name] for name in methods}
    return Suite.model_validate({**content, "methods": kept, "baseline": methods[0], **changes})


def make(suite: Suite, folder: Path, **options: Any) -> str:
    """Run a suite in this process; returns what it printed."""
    out = io.StringIO()
    with SuiteProgress(Console(file=out, width=200), suite, folder, 1) as progress:
        run_suite(suite, folder, progress, **options)
    return out.getvalue()


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it has not come about"
        time.sleep(0.02)


def bench(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sbft", "bench", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> tuple[Path, Path, str, str]:
    """A suite that was stopped by Ctrl-C, then killed, then finished: its file, its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("suites")
    path, out = folder / "sums.yaml", folder / "out"
    path.write_text(yaml.safe_dump(content))
    first = possible_runs(load_suite(path))[0]

    stopped = bench(path, "--output-dir", out)
    wait_for(log_beside(run_folder(out, first)).exists)
    stopped.send_signal(signal.SIGINT)
    _, said_when_stopped = stopped.communicate(timeout=PATIENCE_S)
    assert stopped.returncode == 130 and read_run(out, first) is None
    # Its run ended with it, long before training and evaluation could have ended.
    wait_for(lambda: (lock := try_lock(out, first)) is not None and os.close(lock) is None)
    assert read_run(out, first) is None

    killed = bench(path, "--output-dir", out)
    wait_for(lambda: (record := stored_record(run_folder(out, first))) and record.status == "unfinished")
    killed.kill()
    killed.communicate()
    assert read_run(out, first) is None
    # Its run dies with it: the lock is free again, long before training and evaluation could have ended.
    wait_for(lambda: (lock := try_lock(out, first)) is not None and os.close(lock) is None)
    assert read_run(out, first) is None

    done = bench(path, "--output-dir", out)
    printed, errors = done.communicate(timeout=4 * PATIENCE_S)
    assert done.returncode == 0, printed + errors
    return path, out, said_when_stopped, printed


@pytest.mark.long
def test_ctrl_c_says_how_to_go_on(made: tuple[Path, Path, str, str]) -> None:
    assert "Error: Stopped by Ctrl-C with 0 runs finished" in made[2] and "same command again" in made[2]


@pytest.mark.long
def test_a_suite_goes_on_after_ctrl_c_and_kill_and_makes_every_run_once(made: tuple[Path, Path, str, str]) -> None:
    path, out, _, printed = made
    suite = load_suite(path)
    planned = plan(suite, out)
    assert [one.state for one in planned] == ["done"] * 4
    for one in planned:
        assert printed.count(f"{one.name} begins") == printed.count(f"{one.name}: done in") == 1
    assert "[4/4]" in printed and "exact_match" in printed and "4 runs: 4 done, 0 failed, 0 to do." in printed
    assert stored_suite(out) == suite
    assert (out / "report.md").exists() and str(out / "report.md") in printed


@pytest.mark.long
def test_rates_are_chosen_on_validation_and_measured_on_the_evaluation_part(made: tuple[Path, Path, str, str]) -> None:
    path, out, _, _ = made
    suite = load_suite(path)
    chosen = choose_rate(suite, out, suite.models[0], "sums", "sbft").rate
    measured = {}
    for one in plan(suite, out):
        assert one.run is not None and one.record is not None
        assert one.record.evaluated_on == ("validation" if one.phase == "validation" else "eval")
        assert one.record.data["evaluation_examples"] == (4 if one.phase == "validation" else 6)
        measured[one.name] = (one.record.metrics["exact_match"], -one.record.metrics["loss"])
        assert one.record.learning_rate == one.run.learning_rate
    best = max((name for name in measured if "validation" in name), key=lambda name: measured[name])
    assert f"/lr={chosen:g}/" in best and f"sums/sbft/lr={chosen:g}/test-seed=0" in measured


@pytest.mark.long
def test_records_predictions_and_logs_are_kept_and_weights_are_not(made: tuple[Path, Path, str, str]) -> None:
    path, out, _, _ = made
    for one in plan(load_suite(path), out):
        assert one.run is not None and one.record is not None
        folder = run_folder(out, one.run)
        names = {entry.name for entry in folder.iterdir()}
        assert names == {"run.json", "recipe.yaml", "predictions.jsonl", "log.txt", "process.json"}
        assert "Measuring the trained model" in (folder / "log.txt").read_text()
        assert (one.record.saved_bytes or 0) > 10_000
        process = json.loads((folder / "process.json").read_text())
        assert (process["at_once"], process["cores"]) == (1, os.cpu_count())
        assert process["exit_code"] == 0 and process["elapsed_s"] > (one.record.train_s or 0)
        assert not log_beside(folder).exists()


@pytest.mark.long
def test_the_second_time_nothing_is_run(made: tuple[Path, Path, str, str]) -> None:
    path, out, _, _ = made
    before = {entry: entry.stat().st_mtime_ns for entry in out.rglob("run.json")}
    result = CliRunner().invoke(app, ["bench", str(path), "--output-dir", str(out)])
    assert result.exit_code == 0 and "begins" not in result.output
    assert {entry: entry.stat().st_mtime_ns for entry in out.rglob("run.json")} == before
    listed = CliRunner().invoke(app, ["bench", str(path), "--output-dir", str(out), "--dry-run"])
    assert listed.output.count("done  ") == 4 and "Nothing is left to run." in listed.output


@pytest.mark.long
def test_a_changed_suite_is_refused_and_an_enlarged_one_is_not(made: tuple[Path, Path, str, str]) -> None:
    path, out, _, _ = made
    change = ["--set", "tasks.sums.data.max_length=48"]
    refused = CliRunner().invoke(app, ["bench", str(path), "--output-dir", str(out), *change])
    assert refused.exit_code == 2
    assert "sums/sbft/lr=0.001/validation-seed=0" in refused.stderr
    assert "data.max_length (there 64, now 48)" in refused.stderr and "--output-dir" in refused.stderr
    more = ["--set", "seeds=[0, 1]", "--dry-run"]
    listed = CliRunner().invoke(app, ["bench", str(path), "--output-dir", str(out), *more])
    assert listed.exit_code == 0 and listed.output.count("done  ") == 4 and listed.output.count("to do  ") == 2
    assert "2 runs to do: about " in listed.output


def test_a_pattern_that_fits_nothing_and_recipes_that_cannot_train_are_refused_before_anything_runs(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(content))
    refused = CliRunner().invoke(app, ["bench", str(path), "--only", "sbtf", "--output-dir", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "--only sbtf matches no run" in refused.stderr and "lora, sbft" in refused.stderr
    wrong = ["--set", "training.warmup_stepps=1", "--output-dir", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, ["bench", str(path), *wrong])
    assert refused.exit_code == 2 and "the nearest is warmup_steps" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_runners_share_a_suite_and_neither_repeats_the_other(content: dict[str, Any], tmp_path: Path) -> None:
    suite = suite_of(content, "sbft")
    prepare(suite, tmp_path)
    said: list[str] = []
    runners = [threading.Thread(target=lambda: said.append(make(suite, tmp_path))) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    planned = plan(suite, tmp_path)
    assert [one.state for one in planned] == ["done"] * 3
    for one in planned:
        assert sum(text.count(f"{one.name} begins") for text in said) == 1
    # Each runner has done a validation run; the test run needs both, so one runner waits for the other.
    assert all("validation-seed=0 begins" in text for text in said)
    assert "Waiting for another runner" in "".join(said)
    counts = [json.loads((tmp_path / "runs" / one.name / "process.json").read_text())["at_once"] for one in planned]
    assert max(counts[:2]) == 2


def test_a_run_over_its_time_is_ended_and_only_made_again_when_asked(content: dict[str, Any], tmp_path: Path) -> None:
    suite = suite_of(content, "lora", time_limit_s=0.5)
    (run,) = possible_runs(suite)
    assert "timed out after 0.5 s" in make(suite, tmp_path)
    record = read_run(tmp_path, run)
    assert record is not None and (record.status, record.error) == ("error", "timed out after 0.5 s")
    assert record.recipe["training"]["learning_rate"] == record.learning_rate == 1e-2
    assert make(suite, tmp_path) == ""
    prepare(suite, tmp_path, retry=True)
    assert read_run(tmp_path, run) is None
    assert "timed out after 0.5 s" in make(suite, tmp_path)


def test_a_method_without_its_package_is_a_result_without_a_process(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "lora", replace(METHODS["lora"], packages={"no_such_package": "lora"}))
    suite = suite_of(content, "lora")
    (run,) = possible_runs(suite)
    said = make(suite, tmp_path)
    assert "begins" not in said and "unsupported" in said
    record = read_run(tmp_path, run)
    assert record is not None and record.status == "unsupported" and record.error is not None
    assert "needs the package no_such_package" in record.error and "Type: " in record.error


def ended(suite: Suite, folder: Path, code: str) -> ActiveProcess:
    """A run whose process ran this code instead of training."""
    (run,) = possible_runs(suite)
    target = run_folder(folder, run)
    target.parent.mkdir(parents=True)
    lock = try_lock(folder, run)
    assert lock is not None
    with log_beside(target).open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT)
    process.wait()
    active = ActiveProcess(run, target, lock, 0, None, process)
    active.release()
    return active


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", "oom", "The system ended the process (signal 9)"),
        ("import os; os.kill(os.getpid(), 11)", "error", "The process was ended by SIGSEGV."),
        (
            "print('model: x\\n\\nError: There is no model x.\\nType another.'); raise SystemExit(2)",
            "error",
            "There is no model x.\nType another.",
        ),
        ("import no_such_module", "error", "No module named 'no_such_module'"),
        ("pass", "error", "exit code 0 and no finished record"),
    ],
)
def test_a_process_that_leaves_no_record_gets_one_that_says_why(
    code: str, status: str, error: str, content: dict[str, Any], tmp_path: Path
) -> None:
    suite = suite_of(content, "lora")
    active = ended(suite, tmp_path, code)
    record = conclude(suite, active)
    assert record is not None and record.status == status and error in (record.error or "")
    assert record.error is not None and "model: x" not in record.error
    assert read_run(tmp_path, active.run) == record and (active.folder / "log.txt").exists()


def left_by_sigint(suite: Suite, folder: Path) -> ActiveProcess:
    """A run that was stopped while it trained, and recorded this."""
    stopped = "Stopped by Ctrl-C after step 3 of 9; a checkpoint is in x/checkpoint-3. To resume, type: sbft train x"
    active = ended(suite, folder, f"print('Error: {stopped}'); raise SystemExit(130)")
    record = write_unsupported(suite, folder, active.run, stopped)
    record.status = "interrupted"
    record.save(active.folder)
    return active


@pytest.mark.parametrize(
    "code",
    ["print('Error: Stopped by SIGTERM.'); raise SystemExit(143)", "import os; os.kill(os.getpid(), 15)", None],
    ids=["while loading", "before it listened", "while training"],
)
def test_a_run_that_somebody_stopped_is_no_result(code: str | None, content: dict[str, Any], tmp_path: Path) -> None:
    suite = suite_of(content, "lora")
    active = left_by_sigint(suite, tmp_path) if code is None else ended(suite, tmp_path, code)
    assert conclude(suite, active) is None
    assert read_run(tmp_path, active.run) is None
    record = stored_record(active.folder)
    assert record is not None and record.status == "interrupted" and (record.error or "").startswith("Stopped by ")


@pytest.mark.parametrize("stage", ["loading", "training"])
def test_a_run_that_was_stopped_for_its_time_is_a_result(stage: str, content: dict[str, Any], tmp_path: Path) -> None:
    suite = suite_of(content, "lora")
    loading = "import os; os.kill(os.getpid(), 15)"
    active = left_by_sigint(suite, tmp_path) if stage == "training" else ended(suite, tmp_path, loading)
    active.timed_out, active.time_limit_s = True, 7.0
    record = conclude(suite, active)
    assert record is not None and (record.status, record.error) == ("error", "timed out after 7 s")
    assert read_run(tmp_path, active.run) == record


def test_a_run_is_tidied_again_where_that_was_cut_off(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of(content, "lora")
    active = ended(suite, tmp_path, "raise SystemExit('Error: no')")
    checkpoint = active.folder / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("sbft.bench.outcome.remove_checkpoints", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            conclude(suite, active)
    assert read_run(tmp_path, active.run) is not None and checkpoint.exists()
    prepare(suite, tmp_path)
    assert not checkpoint.exists() and (active.folder / "log.txt").exists() and not log_beside(active.folder).exists()


def test_runs_of_other_runners_on_the_folder_are_counted(content: dict[str, Any], tmp_path: Path) -> None:
    suite = suite_of(content, "sbft")
    locks = [try_lock(tmp_path, run) for run in possible_runs(suite)[:2]]
    assert held_locks(tmp_path) == 2
    for number, lock in enumerate(locks):
        assert lock is not None
        os.close(lock)
        assert held_locks(tmp_path) == 1 - number


def test_on_a_terminal_there_is_a_table_of_every_row(content: dict[str, Any], tmp_path: Path) -> None:
    suite = Suite.model_validate(content)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    run = Run(suite.models[0], "sums", "sbft", 1e-3, 0, "validation")
    with SuiteProgress(console, suite, tmp_path, 1) as progress:
        active = ended(suite_of(content, "lora"), tmp_path, "pass")
        progress.draw(plan(suite, tmp_path), [replace(active, run=run)])
    shown = out.getvalue()
    lora, sbft = (next(line for line in shown.splitlines() if name in line) for name in ("lora", "sbft"))
    assert lora.split()[:4] == ["sums", "lora", "0.01", "0/1"]
    assert "0/2" in sbft and "lr 0.001 0 s" in sbft
    assert "4 runs to do" in shown


def test_drawing_again_reads_no_record(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite.model_validate(content)
    asked: list[str] = []

    def counted(suite: Suite, folder: Path, model: str, task: str, variant: str) -> RateChoice:
        asked.append(variant)
        return choose_rate(suite, folder, model, task, variant)

    monkeypatch.setattr("sbft.bench.live.choose_rate", counted)
    monkeypatch.setattr("sbft.bench.live._REDRAW_EVERY_S", 0.0)
    with SuiteProgress(Console(file=io.StringIO(), force_terminal=True), suite, tmp_path, 1) as progress:
        planned = plan(suite, tmp_path)
        for _ in range(3):
            progress.draw(planned, [])
        assert sorted(asked) == ["lora", "sbft"]
        progress.draw(plan(suite, tmp_path), [])
        assert sorted(asked) == ["lora", "lora", "sbft", "sbft"]


@pytest.mark.long
def test_a_suite_of_pretraining_trains_fresh_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBFT_CACHE", str(tmp_path / "cache"))
    text, path, out = tmp_path / "code.txt", tmp_path / "code.yaml", tmp_path / "out"
    text.write_text("\n\n".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n" for n in range(300)))
    task = {
        "data": {"train": str(text), "max_length": 32, "train_tokens": 8000},
        "evaluation": {"before": False, "limit": 8},
    }
    method = {"learning_rates": [3e-3], "set": {"tokenizer": "bpe:300"}}
    content = {
        "summary": "Functions.", "models": ["scratch:0.4m"], "tasks": {"code": task}, "methods": {"adam": method},
        "baseline": "adam", "seeds": [1],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    process = bench(path, "--output-dir", out)
    said, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    assert "1 run: 1 done, 0 failed, 0 to do." in said
    record = read_run(out, Run("scratch:0.4m", "code", "adam", 3e-3, 1, "test"))
    # A model that has learned nothing has a loss of log(300), 5.7.
    assert record is not None and record.tokens == 8000 and record.metrics["loss"] < 4.0
