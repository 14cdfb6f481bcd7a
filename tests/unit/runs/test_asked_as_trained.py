"""A run records how its model was prompted, so that it is prompted later as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import TrainingError
from sbft.evaluation.generate import evaluate
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.output_folder import check_same_recipe
from sbft.runs.prepare import prepare
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.data.test_chats import RICH, TOOLS, USER, write

PLAIN = {"messages": [USER, {"role": "assistant", "content": "4"}]}
THOUGHTFUL = {"messages": [USER, {"role": "assistant", "content": "4", "reasoning_content": "hm"}]}


def recipe_of(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Recipe:
    model = folder / "model"
    if not model.is_dir():
        save_tiny(model, chat_template=RICH)
    data = write(folder / "train.jsonl", rows)
    flags = {"model": str(model), "data": str(data), "output_dir": str(folder / "run")}
    return resolve(load_recipe(None, list(overrides), **flags))


@pytest.mark.parametrize(("rows", "thinks"), [([PLAIN], False), ([PLAIN, THOUGHTFUL], True)])
def test_the_run_folder_keeps_how_the_model_was_asked(rows: list[dict[str, Any]], thinks: bool, tmp_path: Path) -> None:
    prepared = prepare(recipe_of(tmp_path, rows))
    saved = prepared.recipe.to_yaml()
    assert yaml.safe_load(saved)["data"]["chat_template_kwargs"] == {"enable_thinking": thinks}
    # It can be resumed with the recipe as it was typed, but not with one that says the opposite.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(saved)
    check_same_recipe(tmp_path / "run", recipe_of(tmp_path, rows))
    with pytest.raises(TrainingError, match="enable_thinking"):
        opposite = f"data.chat_template_kwargs.enable_thinking={str(not thinks).lower()}"
        check_same_recipe(tmp_path / "run", recipe_of(tmp_path, rows, opposite))


def test_a_run_of_a_version_with_fewer_settings_is_resumed(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [PLAIN])
    earlier = yaml.safe_load(recipe.to_yaml())
    del earlier["data"]["tools"], earlier["data"]["chat_template_kwargs"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(earlier))
    check_same_recipe(tmp_path / "run", recipe)
    with pytest.raises(TrainingError, match=r"data\.tools \(there tools, here functions\)"):
        check_same_recipe(tmp_path / "run", recipe_of(tmp_path, [PLAIN], "data.tools=functions"))
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({**earlier, "unknown": 1, "seed": 2}))
    with pytest.raises(TrainingError, match=r"data\.tools"):
        check_same_recipe(tmp_path / "run", recipe)


@pytest.mark.parametrize("thinks", [False, True])
def test_generate_asks_as_the_run_was_trained(thinks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(recipe_of(tmp_path, [{**(THOUGHTFUL if thinks else PLAIN), "tools": TOOLS[:1]}]))
    (tmp_path / "model" / "recipe.yaml").write_text(prepared.recipe.to_yaml())
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS[:1]))
    asked: list[list[int]] = []

    def answer(model: Any, tokenizer: Any, prompts: list[list[int]], **_: Any) -> list[str]:
        asked.extend(prompts)
        return ["4"] * len(prompts)

    monkeypatch.setattr("sbft.evaluation.generate.generate_answers", answer)
    arguments = ["generate", str(tmp_path / "model"), "2+2?", "--tools", str(tmp_path / "tools.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (example,) = prepared.examples
    begins = next(place for place, label in enumerate(example["labels"]) if label != -100)
    assert asked == [example["input_ids"][:begins]]
    (tmp_path / "tools.json").write_text("{")
    assert "not valid JSON" in CliRunner().invoke(app, arguments).output


def test_metrics_compare_what_follows_the_thoughts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(*_: Any, **__: Any) -> list[str]:
        return ["<think>\n5?\n</think>\n\n4", "<think>\n4\n</think>\n\n5"]

    monkeypatch.setattr("sbft.evaluation.generate.generate_answers", answer)
    rows = Dataset.from_list([{"prompt": "2+2?", "completion": "<think>\nhm\n</think>\n\n4"}] * 2)
    written = tmp_path / "predictions.jsonl"
    scores = evaluate(tiny_model(), tiny_tokenizer(RICH), rows, metrics=["exact_match"], predictions_path=written)
    assert scores["exact_match"] == 0.5
    assert [json.loads(line)["exact_match"] for line in written.read_text().splitlines()] == [True, False]
