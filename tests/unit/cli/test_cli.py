"""The command line without training: recipes, versions, help, and how mistakes are reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sbft import __version__
from sbft.cli.app import app
from sbft.cli.shared.errors import shown_as_a_paragraph
from sbft.errors import DataError, Interrupted
from sbft.files import shipped_names
from sbft.recipe import recipe_text

HELP_LIMIT_S = 0.4


def sbft(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_answers_quickly_and_names_every_verb() -> None:
    command = [sys.executable, "-m", "sbft", "--help"]
    # CPU time, as other tests may be running on the same cores.
    begin = os.times()
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    end = os.times()
    seconds = (end.children_user + end.children_system - begin.children_user - begin.children_system) / 3
    for verb in ("train", "eval", "generate", "export", "recipes", "batch-size", "bench", "check", "plan", "version"):
        assert f"\n  {verb} " in done.stdout
    assert seconds < HELP_LIMIT_S


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, sbft, sbft.cli.app, sbft.recipe\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version_names_sbft_and_torch() -> None:
    code, out, _ = sbft("version")
    assert code == 0 and f"sbft {__version__}\n" in out and "\ntorch " in out


def test_recipes_are_listed_with_what_they_do() -> None:
    code, out, _ = sbft("recipes", "ls")
    assert code == 0 and "quickstart " in out and "built-in model" in out


def test_recipes_of_a_model_family_are_listed_together_one_line_each() -> None:
    listed = sbft("recipes", "ls")[1].partition("\nNext:")[0].split("\n\n")
    first, families = listed[0].splitlines(), [group.splitlines() for group in listed[1:]]
    assert "quickstart" in {line.split()[0] for line in first} and not [line for line in first if line.endswith(":")]
    assert [group[0] for group in families] == ["gemma:", "llama:", "mistral:", "phi:", "qwen:", "smollm:"]
    names = [line.split()[0] for group in (first, *(group[1:] for group in families)) for line in group]
    assert sorted(names) == shipped_names("recipes")
    qwen = families[4][1:]
    assert all(line.startswith("qwen3-") and " Qwen3 " in line for line in qwen)


def test_a_recipe_is_shown_as_it_is() -> None:
    assert sbft("recipes", "show", "quickstart") == (0, recipe_text("quickstart"), "")


def test_a_recipe_is_copied_but_never_over_another_file(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert sbft("recipes", "cp", "quickstart", str(target))[0] == 0
    assert target.read_text() == recipe_text("quickstart")
    target.write_text("precious")
    code, _, err = sbft("recipes", "cp", "quickstart", str(target))
    assert code == 2 and "already exists" in err and target.read_text() == "precious"
    assert sbft("recipes", "cp", "quickstart", str(tmp_path))[0] == 0
    assert (tmp_path / "quickstart.yaml").exists()
    assert sbft("recipes", "cp", "quickstart", str(tmp_path / "none" / "x.yaml"))[0] == 2


def test_a_mistake_is_one_paragraph_and_exit_code_2() -> None:
    code, out, err = sbft("recipes", "show", "quickstat")
    assert (code, out) == (2, "")
    assert err.startswith("Error: There is no recipe 'quickstat'") and "Did you mean quickstart?" in err
    assert "Traceback" not in err and "\n\n" not in err.strip()


def test_the_traceback_comes_when_asked_for() -> None:
    code, _, err = sbft("recipes", "show", "quickstat", "--traceback")
    assert code == 2 and "Traceback (most recent call last)" in err and "Error: There is no recipe" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("The file x is missing."), 2, "Error: The file x is missing."),
        (KeyboardInterrupt(), 130, "Error: Stopped by Ctrl-C."),
        (KeyboardInterrupt(signal.SIGTERM), 143, "Error: Stopped by SIGTERM."),
        (Interrupted(signal.SIGTERM, " after step 3."), 143, "Error: Stopped by SIGTERM after step 3."),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, shown_as_a_paragraph(traceback=False):
        raise error
    assert caught.value.exit_code == code
    assert said in capsys.readouterr().err


def test_an_unknown_flag_is_exit_code_2() -> None:
    code, _, err = sbft("train", "--modle", "x")
    assert code == 2 and "--modle" in err and "Traceback" not in err


def test_packages_that_are_imported_along_say_nothing() -> None:
    code = (
        "from sbft.cli.shared.quiet import quiet_imports; quiet_imports()\n"
        "import warnings, transformers, peft\n"
        "warnings.warn('`is_gradient_checkpointing` is deprecated and will be removed', FutureWarning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_progress_of_a_long_run_fits_80_columns() -> None:
    import io
    from types import SimpleNamespace
    from typing import Any

    from rich.console import Console

    from sbft.cli.shared.progress import TrainingProgress

    out = io.StringIO()
    progress = TrainingProgress(Console(file=out, force_terminal=True, width=80, color_system=None))
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=54_000)
    arguments: Any = SimpleNamespace(device="cpu")
    progress.on_train_begin(arguments, state, arguments)
    state.global_step = 5_400
    progress.on_log(arguments, state, arguments, logs={"loss": 12.345, "tokens_seen": 1_000_000})
    progress.on_step_end(arguments, state, arguments)
    progress.close()
    last = next(line for line in reversed(out.getvalue().splitlines()) if "5400/" in line)
    assert "5400/54000 loss 12.345" in last and " left" in last and "…" not in out.getvalue()
