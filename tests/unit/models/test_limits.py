"""Token ids and positions that a model lacks are refused with a clear error, before training if the data shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.data.collate import Collator
from sbft.errors import ModelError
from sbft.evaluation.generate import generate_answers
from sbft.evaluation.likelihood import evaluate_loss
from sbft.models.limits import PositionLimit, embedding_rows, position_limit, stated_positions
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TOKENIZER_SIZE = len(tiny_tokenizer())


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("gpt2", PositionLimit(1024, True)),
        ("gptj", PositionLimit(2048, True)),
        ("opt", PositionLimit(2048, True)),
        ("mpt", PositionLimit(2048, True)),
        ("openai-gpt", PositionLimit(512, True)),
        ("roberta", PositionLimit(510, True)),  # of its 512 rows, two are for padding
        ("llama", PositionLimit(2048, False)),
        ("qwen3", PositionLimit(32768, False)),
        ("gemma3", PositionLimit(131072, False)),
        ("xglm", PositionLimit(2048, False)),  # a table that grows
        ("bloom", None),
        ("mamba", None),
    ],
)
def test_a_class_says_how_many_positions_it_has_and_whether_more_fail(kind: str, limit: PositionLimit | None) -> None:
    assert position_limit(AutoConfig.for_model(kind)) == limit


def test_a_limit_is_what_the_model_itself_fails_beyond() -> None:
    model = tiny_model("gpt2", n_positions=40)
    limit = position_limit(model.config)
    assert limit == PositionLimit(40, True) == PositionLimit(stated_positions(model.config) or 0, True)
    with torch.no_grad():
        model(torch.full((1, 40), 5))
        with pytest.raises(IndexError):
            model(torch.full((1, 41), 5))


def test_rows_are_known_of_text_models_alone() -> None:
    assert embedding_rows(GPT2Config(vocab_size=300)) == 300
    assert embedding_rows(AutoConfig.for_model("gemma3")) is None  # its image ids are beyond the vocabulary


Rows = list[dict[str, str]]
SHORT: Rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(12)]
LONG: Rows = [*SHORT, {"prompt": "count the letters " * 10, "completion": "many"}]
ASKED: Rows = [{"prompt": "Is it 7?", "completion": "no"}, LONG[-1]]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    def invoke(verb: str, train: Rows, *settings: str, evaluate: Rows | None = None, **model: Any) -> tuple[int, str]:
        if not (tmp_path / "model").exists():
            save_tiny(tmp_path / "model", **model)
        files = {"--data": train, "--eval-data": evaluate}
        given = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]
        for flag, content in files.items():
            if content is not None:
                path = tmp_path / f"{flag.strip('-')}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in content))
                given += [flag, str(path)]
        given += [word for setting in settings for word in ("--set", setting)]
        found = CliRunner().invoke(app, [verb, *given])
        return found.exit_code, " ".join((found.stdout + found.stderr).split())

    return invoke


GPT2: dict[str, Any] = {"kind": "gpt2", "n_positions": 32}


@pytest.mark.parametrize(
    ("rows", "evaluated", "settings", "model", "words"),
    [
        (LONG, None, (), GPT2, ["The longest example has 74 tokens", "positions for 32", "--set data.max_length=32"]),
        (SHORT, LONG[-1:], (), GPT2, ["positions for 32", "--set data.max_length=32"]),
        (SHORT, None, (), {"vocab": 300}, [f"The tokenizer has {TOKENIZER_SIZE}", "rows for 300", "resize_token_embeddings"]),
        (SHORT, ASKED, ("data.max_length=32", "evaluation.metrics=[exact_match]"), GPT2, ["cannot answer this question"]),
    ],
    ids=["long", "long-evaluation", "tokens", "long-question"],
)
def test_check_and_train_refuse_what_the_model_has_no_room_for(
    command: Callable[..., tuple[int, str]],
    rows: Rows,
    evaluated: Rows | None,
    settings: tuple[str, ...],
    model: dict[str, Any],
    words: list[str],
    tmp_path: Path,
) -> None:
    for verb in ("check", "train"):
        code, said = command(verb, rows, *settings, evaluate=evaluated, **model)
        assert code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_train_goes_on_with_what_it_was_told_to_type(command: Callable[..., tuple[int, str]]) -> None:
    assert command("train", LONG, "data.max_length=32", "training.max_steps=2", **GPT2)[0] == 0


def test_rotary_positions_beyond_those_that_were_trained_are_a_warning(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("check", LONG, max_position_embeddings=32)
    assert code == 1 and "has 74 tokens, and the model was made for 32" in said and "--set data.max_length=32" in said
    code, said = command("train", LONG, "training.max_steps=1")
    assert code == 0 and "was made for 32" in said


def test_tokens_that_no_text_brings_are_a_warning(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("check", SHORT, vocab=TOKENIZER_SIZE - 1)
    assert code == 1 and f"rows for {TOKENIZER_SIZE - 1}" in said and "any text that does fails" in said


def trainer(folder: Path, model: Any, examples: list[dict[str, Any]]) -> SmallBatchTrainer:
    args = SmallBatchTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, save_strategy="no"
    )
    return SmallBatchTrainer(model, args, Collator(2), train_dataset=examples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("example", "words"),
    [([3, 4, 300, 5], "token 300 is in a training example.*rows for 300"), ([3] * 50, "position table for 32")],
)
def test_a_trainer_refuses_the_batch_that_does_not_fit(example: list[int], words: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2", vocab=300, n_positions=32)
    examples = [{"input_ids": example, "labels": example}] * 4
    with pytest.raises(ModelError, match=words):
        trainer(tmp_path, model, examples).train()
    short = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    trainer(tmp_path, model, short).train()


def test_a_class_is_asked_once_in_a_training_of_longer_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "sbft.models.limits.position_limit", lambda config: asked.append(config) or PositionLimit(8, hard=False)
    )
    long = [{"input_ids": [3] * 12, "labels": [3] * 12}] * 4
    trainer(tmp_path, tiny_model(max_position_embeddings=8), long).train()
    assert len(asked) == 1


def test_what_is_evaluated_or_asked_is_refused_too_and_answers_end_where_positions_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, tokenizer = tiny_model("gpt2", vocab=300, n_positions=32), tiny_tokenizer()
    for ids in ([[3, 400]], [[3] * 33]):
        with pytest.raises(ModelError, match="prompt"):
            generate_answers(model, tokenizer, ids, max_new_tokens=4)
        with pytest.raises(ModelError, match="an example"):
            evaluate_loss(model, [{"input_ids": ids[0], "labels": ids[0]}], Collator(2))
    assert not caplog.text
    assert len(generate_answers(model, tokenizer, [[5] * 28, [5] * 4], max_new_tokens=8)) == 2
    assert "does not fit the model's 32 positions" in caplog.text
