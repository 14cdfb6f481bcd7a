"""Bad input: exit code 2, one paragraph that names the problem and what to do, no traceback, nothing half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.runs.record import RunRecord
from tests.tiny import save_tiny

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(12)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, tiny_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `sbft train` on valid input except for the given arguments; returns the paragraph."""
    monkeypatch.chdir(tmp_path)

    def train(*arguments: str | Path, **changed: str | Path) -> str:
        flags = {"model": tiny_dir, "data": data, "output-dir": tmp_path / "out", **changed}
        command = ["train", *map(str, arguments)]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        before = files(tmp_path)
        result = CliRunner().invoke(app, command)
        paragraph = result.stderr.strip()
        assert result.exit_code == 2, result.output
        assert paragraph.startswith("Error: ") and "\n\n" not in paragraph and "Traceback" not in paragraph
        assert files(tmp_path) == before
        return paragraph

    return train


def test_unknown_recipe(refused: Any) -> None:
    assert "no recipe 'quickstrat'" in (said := refused("quickstrat")) and "Did you mean quickstart?" in said


def test_misspelt_and_contradictory_keys(refused: Any) -> None:
    said = refused(
        *("--set", "data.max_lenght=5", "--set", "optimizer.beta2=0.9", "--set", "training.max_grad_norm=1"),
        *("--set", "optimizer.second_moment_half_life=1000"),
    )
    for part in ("3 problems", "the nearest is max_length", "Keep one", "gradient_release"):
        assert part in said


@pytest.mark.parametrize("rate", ["-0.1", ".nan"])
def test_learning_rate(refused: Any, rate: str) -> None:
    assert "finite number of at least 0" in refused("--set", f"training.learning_rate={rate}")


def test_half_life_and_beta2(refused: Any) -> None:
    said = refused("--set", "optimizer.second_moment_half_life=9", "--set", "optimizer.beta2=0.9")
    assert "optimizer.beta2" in said and "optimizer.second_moment_half_life" in said


def test_accumulation_with_release(refused: Any) -> None:
    said = refused("--set", "training.gradient_accumulation_steps=4")
    assert "Write 1" in said and "gradient_release: false" in said


def test_float16(refused: Any) -> None:
    assert "overflows" in refused("--set", "dtype=float16")


def test_missing_package(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.recipe.contradictions.importlib.util.find_spec", lambda name: None)
    assert "scripts/setup.sh" in refused("--method", "lora")


def test_missing_file(refused: Any) -> None:
    assert "none.jsonl" in refused(data="none.jsonl")


def test_empty_file(refused: Any, tmp_path: Path) -> None:
    assert "empty" in refused(data=write_rows(tmp_path / "empty.jsonl", []))


def test_broken_json_line(refused: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "broken.jsonl", ROWS)
    path.write_text(path.read_text().replace(json.dumps(ROWS[4]), '{"prompt": "What'))
    said = refused(data=path)
    assert "line 5" in said.lower() and "broken.jsonl" in said


def test_missing_column(refused: Any) -> None:
    said = refused("--set", "data.prompt=question")
    assert "question" in said and "'prompt'" in said and "'completion'" in said


def test_no_example_left(refused: Any) -> None:
    assert "No example is left" in refused("--set", "data.max_length=3")


def test_unknown_metric(refused: Any) -> None:
    assert "the nearest is exact_match" in refused("--set", "evaluation.metrics=[exact_mach]")


def test_evaluation_question_also_in_training(refused: Any, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", ROWS[:3])
    said = refused(eval_data=test)
    assert "3 questions" in said and "what is 0 and 0?" in said.lower() and "data.allow_overlap: true" in said


def test_unknown_model_with_the_hub_unreachable(refused: Any) -> None:
    assert "nobody/no-such-model" in refused(model="nobody/no-such-model")


def test_unknown_builtin_model(refused: Any) -> None:
    assert "builtin:smollm2-135m" in refused(model="builtin:smollm")


def test_a_model_that_is_no_causal_language_model(refused: Any, tmp_path: Path, tiny_dir: Path) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_dir / name).read_bytes())
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    assert "causal" in refused(model=folder)


def test_adapter_layers_that_the_model_has_not(refused: Any) -> None:
    said = refused("--method", "lora", "--set", "lora.target_modules=[nothing]")
    assert "q_proj" in said and "all-linear" in said


def test_output_folder_that_is_not_empty(refused: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert "exists and is not empty" in refused()
    # --overwrite replaces the output of a run, and nothing else.
    assert "no run of sbft has made" in refused("--overwrite")


def test_output_folder_that_cannot_be_made(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note").write_text("a file")
    # Noticed before data and model are read: neither exists.
    missing = {"model": "nobody/none", "data": "none.jsonl"}
    said = refused(**missing, output_dir=tmp_path / "note" / "runs" / "mine")
    assert f"{tmp_path / 'note'} is no folder" in said and "--output-dir" in said
    assert "is a file" in refused(**missing, output_dir=tmp_path / "note")
    monkeypatch.setattr("sbft.runs.output_folder.os.access", lambda path, mode: path != tmp_path)
    assert "no permission" in refused(**missing)


def test_overwriting_the_folder_that_the_model_or_the_data_lie_in(refused: Any, tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    save_tiny(out)
    RunRecord(method="sbft", model="m", dataset="d", seed=0, status="ok").save(out)
    assert ", and model (" in refused("--overwrite", model=out)
    link = tmp_path / "link"
    link.symlink_to(out)
    assert ", and model (" in refused("--overwrite", model=link)
    inside = out / "train.jsonl"
    inside.write_bytes(data.read_bytes())
    assert ", and data.train (" in refused("--overwrite", data=inside)


def test_nothing_to_resume(refused: Any, tmp_path: Path) -> None:
    assert "no checkpoint" in refused("--resume")
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    assert "no intact checkpoint (checkpoint-3: it was not written completely" in refused("--resume")


# ---- tests that need a process of their own ----------------------------------------------------------------------


@pytest.mark.long
def test_out_of_memory_says_what_was_largest_and_which_switch_lowers_it(tmp_path: Path) -> None:
    """A process that may not map more memory gets the real error of the real allocator."""
    model = save_tiny(tmp_path / "model", max_position_embeddings=100_000)
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "fox " * 30_000, "completion": "dog"}] * 2)
    code = f"""
        import resource, sys
        from sbft.cli.app import app
        import sbft.runs.run_recipe, peft, torch
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
        app(["train", "--model", {str(model)!r}, "--data", {str(long)!r}, "--output-dir", {str(tmp_path / "out")!r},
             "--set", "data.max_length=90000"])
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stdout + done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("Error: Out of memory. The largest part: the activations")
    assert "--set training.gradient_checkpointing=true" in said
    record = RunRecord.load(tmp_path / "out")
    assert record.status == "oom" and record.error is not None and record.error in said


@pytest.mark.long
def test_ctrl_c_leaves_a_checkpoint_to_resume_exactly(tmp_path: Path, tiny_dir: Path, data: Path) -> None:
    from safetensors.torch import load_file

    def command(out: str) -> list[str]:
        flags = ["--model", str(tiny_dir), "--data", str(data), "--output-dir", str(tmp_path / out)]
        return [sys.executable, "-m", "sbft", "train", *flags, "--set", "training.max_steps=200"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command("out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 10/"):
            break
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("Error: Stopped by Ctrl-C after step ") and "Traceback" not in said
    resume = last.partition("type: sbft ")[2].split()
    assert resume == ["train", f"{tmp_path / 'out'}/recipe.yaml", "--resume"]
    assert RunRecord.load(tmp_path / "out").status == "error"

    resumed = CliRunner().invoke(app, resume)
    assert resumed.exit_code == 0, resumed.output
    straight = CliRunner().invoke(app, command("straight")[3:])
    assert straight.exit_code == 0, straight.output
    interrupted, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "straight"))
    assert all(interrupted[name].equal(whole[name]) for name in whole)
    one, other = RunRecord.load(tmp_path / "out"), RunRecord.load(tmp_path / "straight")
    assert (one.status, one.steps, one.tokens) == ("ok", 200, other.tokens)


@pytest.mark.parametrize("seconds", [0.15, 0.4, 1.0, 2.0])  # while it imports sbft, pydantic, torch, transformers
def test_ctrl_c_before_training_leaves_nothing(tmp_path: Path, tiny_dir: Path, data: Path, seconds: float) -> None:
    command = ["sbft", "train", "--model", str(tiny_dir), "--data", str(data)]
    # Until sbft is imported, Python itself prints a traceback, so the time is counted from there.
    code = "import sbft.cli, sys; print(flush=True); sys.argv = sys.argv[1:]; sbft.cli.main()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--output-dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert running.stdout is not None
    running.stdout.readline()
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "Stopped by Ctrl-C" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
