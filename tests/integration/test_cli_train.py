"""`sbft train`, `eval` and `generate` on a tiny model: what they print, and what they leave behind."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.cli.shared.progress import TrainingProgress
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(24)]


def sbft(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:18]), ("test", ROWS[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, data: Path) -> tuple[Path, str]:
    """A finished run of method sbft, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    printed = sbft(
        *("train", "--model", tiny_dir, "--data", data / "train.jsonl", "--eval-data", data / "test.jsonl"),
        *("--output-dir", out, "--set", "training.num_train_epochs=2", "--set", "training.learning_rate=1e-2"),
        *("--set", "evaluation.metrics=[exact_match]", "--set", "training.logging_steps=9"),
    )
    return out, printed


def test_it_prints_the_recipe_the_progress_the_result_and_the_next_command(trained: tuple[Path, str]) -> None:
    out, printed = trained
    # Printed are the differences from the method's defaults, and where to find the rest.
    brief, _, rest = printed.partition("All other settings are those of method sbft:")
    assert yaml.safe_load(brief)["training"] == {"num_train_epochs": 2, "learning_rate": 0.01, "logging_steps": 9}
    assert "optimizer" not in brief and rest.lstrip().startswith(f"{out}/recipe.yaml will list every one.")
    assert "second_moment_half_life: 22" in (out / "recipe.yaml").read_text()
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["9/36", "18/36", "27/36", "36/36"]
    for part in ("loss ", "tokens/s", "peak ", " GiB", " left"):
        assert part in lines[0]
    assert "18 examples" in printed and "exact_match" in printed
    assert f"The model is in {out}" in printed
    assert printed.rstrip().endswith(f'Next: sbft generate {out} "Your question"')


def test_the_record_says_what_was_run_and_measured(trained: tuple[Path, str], tiny_dir: Path) -> None:
    out, _ = trained
    record = RunRecord.load(out)
    assert (record.status, record.error, record.method, record.model) == ("ok", None, "sbft", str(tiny_dir))
    assert (record.steps, record.skipped_steps, record.per_device_batch_size, record.world_size) == (36, 0, 1, 1)
    assert record.data["examples"] == 18 and record.data["evaluation_examples"] == 6
    assert record.tokens == 2 * (record.data["tokens"] or 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert record.parameters == record.trainable_parameters == parameters
    assert 0 <= (record.memory["weights"] or 0) - 2 * parameters < 1024  # bfloat16, and a few buffers
    assert record.memory["gradients"] == 2 * max(parameter.numel() for parameter in model.parameters())
    # All sides of these layers are below 128, so no second moment is factored.
    assert 4 * parameters <= (record.memory["optimizer_state"] or 0) < 4 * parameters + 1024
    assert record.memory_kind == ("cuda_allocated" if torch.cuda.is_available() else "resident")
    assert (record.peak_memory_bytes or 0) >= (record.memory["baseline"] or 0) > 0
    assert (record.memory["evaluation_peak"] or 0) > 0
    assert 0 < (record.step_s["median"] or 0) <= (record.step_s["p90"] or 0)
    assert (record.optimizer_s["median"] or 0) > 0
    assert record.tokens_per_s == pytest.approx(record.tokens / (record.train_s or 0))
    assert (record.eval_s or 0) > 0 and record.versions["torch"] and record.device
    assert set(record.metrics) == set(record.metrics_before) == {"loss", "perplexity", "exact_match"}
    assert record.metrics["loss"] < record.metrics_before["loss"]
    assert math.isfinite(record.train_loss or math.nan) and record.evaluated_on == "eval"


def test_the_folder_is_a_plain_checkpoint_with_card_recipe_and_predictions(trained: tuple[Path, str]) -> None:
    out, _ = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id is not None
    record = RunRecord.load(out)
    assert resolve(load_recipe(out / "recipe.yaml")) == Recipe.model_validate(record.recipe)
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and f"{record.metrics['loss']:.4g}" in card
    predictions = [json.loads(line) for line in (out / str(record.predictions)).read_text().splitlines()]
    assert [row["reference"] for row in predictions] == [row["completion"] for row in ROWS[18:]]
    assert {"prompt", "reference", "prediction", "exact_match"} <= set(predictions[0])


def test_eval_measures_the_same_again(trained: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    out, _ = trained
    measured = json.loads(sbft("eval", out, "--json"))
    record = RunRecord.load(out)
    assert measured.pop("examples") == 6
    assert measured == pytest.approx(record.metrics, rel=1e-3)
    answers = tmp_path / "answers.jsonl"
    printed = sbft("eval", out, "--data", data / "train.jsonl", "--limit", "3", "--predictions", answers)
    assert printed.startswith("3 examples\n") and len(answers.read_text().splitlines()) == 3


def test_eval_of_a_model_that_no_run_has_made_needs_data(tiny_dir: Path, data: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tiny_dir)])
    assert result.exit_code == 2 and "--data D" in result.stderr
    assert "perplexity" in sbft("eval", tiny_dir, "--data", data / "test.jsonl")


def test_generate_answers_as_the_evaluation_did(trained: tuple[Path, str]) -> None:
    out, _ = trained
    first = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    answered = sbft("generate", out, first["prompt"], "--max-new-tokens", "16")
    assert answered == first["prediction"] + "\n"


def test_lora_saves_an_adapter_that_eval_takes(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    sbft(
        *("train", "--model", tiny_dir, "--data", data / "train.jsonl", "--eval-data", data / "test.jsonl"),
        *("--method", "lora", "--output-dir", out, "--set", "training.learning_rate=1e-2"),
    )
    record = RunRecord.load(out)
    assert record.status == "ok" and record.metrics["loss"] < record.metrics_before["loss"]
    assert 0 < record.trainable_parameters < record.parameters / 2
    # Adapters of rank 16 in float32, with two moments each.
    assert record.memory["gradients"] == 4 * record.trainable_parameters
    assert (record.memory["optimizer_state"] or 0) >= 8 * record.trainable_parameters
    assert (out / "adapter_config.json").exists() and not (out / "model.safetensors").exists()
    assert "library_name: peft" in (out / "README.md").read_text()
    assert json.loads(sbft("eval", out, "--json"))["loss"] == pytest.approx(record.metrics["loss"], rel=1e-3)


def test_qlora_saves_an_adapter_that_eval_and_generate_put_on_four_bits(
    tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "qlora"
    sbft(
        *("train", "--model", tiny_dir, "--data", data / "train.jsonl", "--eval-data", data / "test.jsonl"),
        *("--method", "qlora", "--output-dir", out, "--set", "training.learning_rate=1e-2"),
        *("--set", "evaluation.metrics=[exact_match]"),
    )
    record = RunRecord.load(out)
    assert record.status == "ok" and record.metrics["loss"] < record.metrics_before["loss"]
    assert not (out / "model.safetensors").exists()
    assert json.loads(sbft("eval", out, "--json"))["loss"] == pytest.approx(record.metrics["loss"], rel=1e-6)
    first = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert sbft("generate", out, first["prompt"], "--max-new-tokens", "16") == first["prediction"] + "\n"
    # On the base in bfloat16, the adapter gives a different model.
    (out / "base_quantization.json").unlink()
    assert json.loads(sbft("eval", out, "--json"))["loss"] != pytest.approx(record.metrics["loss"], rel=1e-6)


def test_the_help_names_every_method() -> None:
    # A name may be broken at its hyphen at the end of a line.
    shown = "".join(sbft("train", "--help").replace("│", " ").split())
    assert all(method in shown for method in METHODS)


@pytest.mark.long
def test_two_processes_train_together(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    command = [
        *(
            "train",
            "--model",
            str(tiny_dir),
            "--data",
            str(data / "train.jsonl"),
            "--output-dir",
            str(tmp_path / "out"),
        ),
        *("--num-processes", "2", "--set", "training.logging_steps=3"),
    ]
    refused = CliRunner().invoke(app, [*command, "--method", "muon"])
    assert refused.exit_code == 2 and "optimizer.gradient_release=false" in refused.stderr
    assert not (tmp_path / "out").exists()
    # Its processes print to the real stdout, which a CliRunner does not see.
    done = subprocess.run(
        [sys.executable, "-m", "sbft", *command, "--set", "optimizer.gradient_release=false"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["3/9", "6/9", "9/9"]
    record = RunRecord.load(tmp_path / "out")
    assert (record.status, record.world_size, record.steps) == ("ok", 2, 9)
    assert record.tokens == record.data["tokens"]


def test_a_run_that_fails_leaves_its_record_and_can_be_started_again(
    tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["train", "--model", str(tiny_dir), "--data", str(data / "train.jsonl"), "--output-dir", str(out)]
    diverging = ["--set", "training.learning_rate=1e30", "--set", "optimizer.max_skipped_steps=2"]
    failed = CliRunner().invoke(app, [*command, *diverging])
    assert failed.exit_code == 2 and "finite" in failed.stderr and "Traceback" not in failed.stderr
    record = RunRecord.load(out)
    assert record.status == "error" and record.error is not None and record.skipped_steps >= 2
    sbft(*command, "--set", "training.max_steps=1")
    assert RunRecord.load(out).status == "ok"
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    sbft(*command, "--set", "training.max_steps=2", "--overwrite")
    assert RunRecord.load(out).steps == 2


def test_a_fault_inside_training_is_recorded(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("made on purpose")

    monkeypatch.setattr("sbft.runs.run_recipe.SmallBatchTrainer.train", broken)
    recipe = load_recipe(None, model=str(tiny_dir), data=str(data / "train.jsonl"), output_dir=str(tmp_path / "out"))
    with pytest.raises(ZeroDivisionError):
        run(recipe)
    record = RunRecord.load(tmp_path / "out")
    assert (record.status, record.error) == ("error", "ZeroDivisionError: made on purpose")


def test_tensorboard_gets_the_losses(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = load_recipe(
        None, ["training.report_to=tensorboard", "training.max_steps=4", "training.logging_steps=2"],
        model=str(tiny_dir), data=str(data / "train.jsonl"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    run(recipe)
    events = next((tmp_path / "out").rglob("events.out.tfevents.*"))
    read = EventAccumulator(str(events.parent))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4]


def test_on_a_terminal_there_is_a_bar(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    recipe = load_recipe(
        None, ["training.max_steps=12", "training.logging_steps=4"],
        model=str(tiny_dir), data=str(data / "train.jsonl"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    run(recipe, callbacks=[TrainingProgress(terminal)])
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    for part in ("━", "12/12", "loss ", "tokens/s", "peak ", "0:00 left"):
        assert part in shown
