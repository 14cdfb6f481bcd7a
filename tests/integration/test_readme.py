"""The commands and Python examples of the README and the documentation, run as printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sbft.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "trainer.md")  # test_combinations.py runs it, with other kinds of models
BUILTIN = "builtin:smollm2-135m"


def blocks(language: str) -> list[str]:
    """The code blocks of a language in all pages, each once; code that is not to be run is in blocks of text."""
    found = [block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]
    return list(dict.fromkeys(found))


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working folder of a reader who has data files of their own."""
    for name, first in (("my.jsonl", 0), ("my-test.jsonl", 50)):
        rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(first, first + 4)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def environment() -> dict[str, str]:
    """Variables that make the environment of these tests the active one: the scripts must not create another."""
    here = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{here}:{os.environ['PATH']}", "VIRTUAL_ENV": str(here.parent)}


def run(command: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**environment(), **more}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[1])
def test_python_examples_run(code, folder, tiny_dir):
    """The built-in model is too large for a test: a tiny one replaces it, and everything else is as printed."""
    run([sys.executable, "-c", code.replace(BUILTIN, str(tiny_dir))], folder)


def test_the_first_python_example_is_ten_lines_of_code():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


def test_commands_of_the_command_line_run_in_their_order(folder, tiny_dir, monkeypatch):
    """All in this process, which has already imported everything; test_cli_train.py and others start processes."""
    monkeypatch.chdir(folder)
    for command in commands():
        words = shlex.split(command)
        if words[0] == "bash":
            continue
        assert words[0] == "sbft"
        if words[1] == "train":
            words += ["--set", f"model={tiny_dir}", "--set", "data.max_length=128"]
        if words[1] == "pretrain":  # a little text instead of Python's whole library
            (folder / "my.txt").write_text("\n\n".join(f"{i} and {i} are {2 * i}." for i in range(400)))
            words += ["--set", "data.train=my.txt", "--set", "tokenizer=bpe:300", "--set", "data.max_length=16"]
            words += ["--set", "training.max_steps=2"]
        if words[1] == "bench":  # test_bench.py runs suites
            words += ["--dry-run"]
        done = CliRunner().invoke(app, words[1:])
        if "--offload" in words and not torch.cuda.is_available():  # and it says so
            assert done.exit_code == 2 and "computes in the host's memory" in " ".join(done.output.split())
            continue
        assert done.exit_code == 0, f"{command}\n{done.output}"
        out = done.output
        if words[1] == "recipes" and words[2] == "ls":
            assert "questions" in out
    record = json.loads((folder / "runs" / "mine" / "run.json").read_text())
    assert record["status"] == "ok" and record["steps"] == 4
    assert (folder / "runs" / "table.md").exists()


def test_the_readme_names_the_two_scripts_first():
    assert [command.split("#")[0].strip() for command in commands()[:2]] == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
    ]
    assert all((ROOT / command.split()[1]).exists() for command in commands()[:2])


@pytest.mark.long
def test_quickstart_trains_three_times_and_prints_their_table(tmp_path, tiny_dir):
    """The whole script, on a tiny model and few examples; at full size it takes minutes."""
    few = ["data.train_size=3", "data.eval_size=2", f"model={tiny_dir}"]
    arguments = [word for setting in few for word in ("--set", setting)]
    out = run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *arguments], tmp_path, QUICKSTART_DIR=str(tmp_path / "q")
    )
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == "run" and rows[2:] == ["sbft", "nearest", "lora"]
    for name in ("sbft", "nearest", "lora"):
        assert json.loads((tmp_path / "q" / name / "run.json").read_text())["status"] == "ok"
    assert (tmp_path / "q" / "table.md").exists() and (tmp_path / "q" / "picture.png").exists()
