"""`sbft eval --harness`: flags and files without lm-evaluation-harness, and tiny local tasks with it."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import DataError, MissingPackageError
from sbft.evaluation.harness import Score, TaskResult, load_tasks, read, run_tasks, save
from tests.tiny import tiny_model, tiny_tokenizer

RESULT = TaskResult("gsm8k", 3.0, 5, 20, [Score("exact_match", "strict-match", 0.25, 0.1, True)])
COLOURS = [
    {"question": f"Which is the colour of fox {i}?", "choices": ["brown", "red", "the dog"], "answer": i % 3}
    for i in range(9)
]
COLOUR_TASK = """
task: sbft_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ECHO_TASK = """
task: sbft_echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
GROUP = "group: sbft_both\ntask: [sbft_colours, sbft_echo]\nmetadata: {version: 1}\n"


def sbft(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--harness", "gsm8k", "--data", "a.jsonl"], "--data cannot be given with --harness"),
        (["--harness", "gsm8k", "--metric", "accuracy", "--predictions", "p"], "--metric and --predictions cannot"),
        (["--harness", "gsm8k", "--set", "data.prompt=q"], "--set data.prompt=q changes nothing"),
        (["--harness", " , "], "--harness names no task"),
        (["--harness-tasks", "folder"], "--harness-tasks belongs to --harness TASKS"),
        (["--chat-template", "--output", "a.json"], "--chat-template and --output belongs to --harness"),
        (["--harness", "gsm8k", "--output", "none/a.json"], "cannot be written to none/a.json"),
    ],
)
def test_contradictory_flags_are_refused(tiny_dir: Path, arguments: list[str], expected: str) -> None:
    code, _, error = sbft("eval", tiny_dir, *arguments)
    assert code == 2 and expected in error


def test_a_missing_harness_says_what_to_type(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as for a package that is not installed
    with pytest.raises(MissingPackageError, match="lm-evaluation-harness 0.4.12 or later.*pip install 'lm-eval>="):
        load_tasks(["gsm8k"])
    code, _, error = sbft("eval", tiny_dir, "--harness", "gsm8k", "--output", tmp_path / "a.json")
    assert code == 2 and "pip install" in error and not (tmp_path / "a.json").exists()


def test_results_of_other_tasks_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.evaluation.harness.version", lambda name: "1.0")
    path = tmp_path / "harness.json"
    save([RESULT], path, model="m", limit=20)
    save([TaskResult("arc", 1.0, 0, 9, [Score("acc", "none", 0.5, None, True)])], path, model="m", limit=None)
    save([TaskResult("arc", 1.0, 0, 9, [Score("acc", "none", 0.75, None, True)])], path, model="m", limit=None)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert set(kept) == {"gsm8k", "arc"} and kept == read(path)
    assert kept["arc"]["scores"][0]["value"] == 0.75 and kept["arc"]["limit"] is None
    assert kept["gsm8k"]["limit"] == 20 and kept["gsm8k"]["shots"] == 5 and kept["gsm8k"]["model"] == "m"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("contents", ["no json", "[1]", '{"loss": 1.0}', '{"loss": {"value": 1}}'])
def test_other_files_are_not_written_over(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "harness.json"
    path.write_text(contents, encoding="utf-8")
    with pytest.raises(DataError, match="holds no results of the harness"):
        save([RESULT], path)
    assert path.read_text(encoding="utf-8") == contents


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, without what is slow: thousands of other tasks, and a list of all packages."""
    manager: Any = pytest.importorskip("lm_eval.tasks.manager")
    monkeypatch.setattr(manager, "TaskManager", functools.partial(manager.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in COLOURS), encoding="utf-8")
    for name, text in {"colours": COLOUR_TASK, "echo": ECHO_TASK}.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    (folder / "both.yaml").write_text(GROUP, encoding="utf-8")
    return folder


def likeliest(model: Any, tokenizer: Any, row: dict[str, Any]) -> int:
    """The choice whose tokens are likeliest after the question, computed by hand."""
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
    scores = []
    for choice in row["choices"]:
        answer = tokenizer(f" {choice}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    return scores.index(max(scores))


def test_a_task_is_measured_as_by_hand(tasks: Path) -> None:
    model, tokenizer = tiny_model(dtype=torch.float32, seed=4), tiny_tokenizer()
    model.train()
    right = [likeliest(model, tokenizer, row) == row["answer"] for row in COLOURS]
    assert 0 < sum(right) < 9
    loaded = load_tasks(["sbft_colours"], tasks)
    for limit, batch_size in ((None, 4), (5, 1)):
        (result,) = run_tasks(model, tokenizer, loaded, limit=limit, batch_size=batch_size)
        counted = right[:limit]
        (score,) = result.scores
        assert (result.task, result.version, result.shots, result.examples) == ("sbft_colours", 1.0, 0, len(counted))
        assert (score.metric, score.filter, score.higher_is_better) == ("acc", "none", True)
        assert score.value == pytest.approx(sum(counted) / len(counted)) and score.stderr is not None
    assert model.training


def test_adapters_are_measured_with_what_they_add(tasks: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model, tokenizer = tiny_model(dtype=torch.float32, seed=4), tiny_tokenizer()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    expected = sum(likeliest(adapted, tokenizer, row) == row["answer"] for row in COLOURS) / 9
    (result,) = run_tasks(adapted, tokenizer, load_tasks(["sbft_colours"], tasks))
    assert result.scores[0].value == pytest.approx(expected)


def test_the_command_measures_groups_and_keeps_what_it_found(tiny_dir: Path, tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.json"
    options = ["--harness-tasks", tasks, "--output", output, "--limit", "4", "--batch-size", "2"]
    code, printed, error = sbft("eval", tiny_dir, "--harness", "sbft_both", *options)
    assert code == 0, error
    lines = printed.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "shots", "examples"]
    assert [line.split()[:2] for line in lines[1:3]] == [["sbft_colours", "acc"], ["sbft_echo", "exact_match"]]
    assert "±" in lines[1] and lines[1].split()[-2:] == ["0", "4"] and str(output) in lines[-1]
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert set(kept) == {"sbft_colours", "sbft_echo"}
    assert kept["sbft_echo"]["limit"] == 4 and kept["sbft_echo"]["batch_size"] == 2
    assert kept["sbft_echo"]["model"] == str(tiny_dir) and kept["sbft_echo"]["dtype"] == "bfloat16"
    chat = ["--chat-template", "--set", "dtype=float32", "--json"]
    code, printed, error = sbft("eval", tiny_dir, "--harness", "sbft_e*", *options, *chat)
    assert code == 0, error
    assert json.loads(printed)["sbft_echo"]["examples"] == 4
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert kept["sbft_echo"]["chat_template"] and kept["sbft_echo"]["dtype"] == "float32"
    assert not kept["sbft_colours"]["chat_template"]


def test_unknown_tasks_get_the_nearest_names(tasks: Path) -> None:
    with pytest.raises(
        DataError, match="no task 'sbft_colors'.*Did you mean sbft_colours.*has sbft_both, sbft_colours"
    ):
        load_tasks(["sbft_colors"], tasks)
    with pytest.raises(DataError, match="There is no folder"):
        load_tasks(["sbft_colours"], tasks / "none")


@pytest.mark.slow
def test_tasks_that_come_with_the_harness_need_a_hub() -> None:
    pytest.importorskip("lm_eval.tasks.manager")
    with pytest.raises(DataError, match="data of arc_easy could not be loaded.*HF_HUB_OFFLINE"):
        load_tasks(["arc_easy"])


def test_a_task_with_broken_data_says_why(tasks: Path) -> None:
    (tasks.parent / "colours.jsonl").unlink()
    with pytest.raises(DataError, match="data of sbft_colours could not be loaded"):
        load_tasks(["sbft_colours"], tasks)


def test_a_task_that_runs_what_the_model_writes_is_refused(tasks: Path) -> None:
    path = tasks / "echo.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "unsafe_code: true\n", encoding="utf-8")
    with pytest.raises(DataError, match="sbft_echo runs code that the model has written"):
        run_tasks(tiny_model(), tiny_tokenizer(), load_tasks(["sbft_both"], tasks))


def test_a_chat_template_that_is_not_there_is_refused(tasks: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        run_tasks(tiny_model(), tiny_tokenizer(None), load_tasks(["sbft_echo"], tasks), chat_template=True)
