"""Every snippet of docs/trainer.md, run as printed on tiny models of the same names: its loss falls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from sbft.cli.app import app
from tests import combinations

PAGE = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
SECTION = re.compile(r"^## (.+?)\n(?:(?!^## ).)*?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = dict(SECTION.findall(PAGE))
# A rate for random models, which have more to learn than trained ones.
STEPS, RATE = 16, 1e-1


def run(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a snippet in `folder`; returns its trainer."""
    code = SNIPPETS[title]
    combinations.make(code, folder)
    monkeypatch.chdir(folder)
    changed, count = re.subn(
        r"learning_rate=[\d.e-]+",
        f"learning_rate={RATE}, max_steps={STEPS}, logging_steps=1, save_strategy='no', report_to=[], use_cpu=True, "
        "disable_tqdm=True",
        code,
    )
    assert count == 1, code
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(changed, title, "exec"), names)
    return names["trainer"]


def logged(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("title", [title for title in SNIPPETS if not title.startswith("GRPO")])
def test_the_loss_falls(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import trl" in SNIPPETS[title]:
        pytest.importorskip("trl")
    if "AutoImageProcessor" in SNIPPETS[title] and Version(transformers.__version__) < Version("5.20"):
        pytest.importorskip("torchvision")
    if "sentence_transformers" in SNIPPETS[title]:
        pytest.importorskip("sentence_transformers")
    losses = logged(run(title, tmp_path, monkeypatch), "loss")
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses


def test_the_reward_of_grpo_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    rewards = logged(run("GRPO with a rule as reward", tmp_path, monkeypatch), "reward")
    assert sum(rewards[-4:]) > sum(rewards[:4]), rewards


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("google-bert/bert-base-uncased", "not a causal language model"),
        ("google-t5/t5-small", "not a causal language model"),
        ("google/vit-base-patch16-224", "not a causal language model"),
        ("openai/whisper-tiny", "not a causal language model"),
        ("google/gemma-3-4b-it", "what images or sound would add is not predicted"),
    ],
)
def test_plan_says_what_it_cannot_predict(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    combinations.make(f'"{name}"', tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", f"./{name}", "--gpu-memory", "8GiB", "--methods", "sbft", "--sequence-length", "16"]
    done = CliRunner().invoke(app, words)
    assert said in " ".join(done.output.split())
    assert done.exit_code == (2 if "not a causal" in said else 0)


def test_every_section_but_the_last_has_one_snippet() -> None:
    assert len(SNIPPETS) == PAGE.count("\n## ") - 1 == 14
