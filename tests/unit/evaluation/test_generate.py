"""Loss at labels only, answers in order, and the metrics that come with the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sbft import metrics
from sbft.data.collate import Collator
from sbft.data.format import encode_prompts, format_dataset
from sbft.errors import DataError
from sbft.evaluation import generate as evaluation
from sbft.evaluation import likelihood
from sbft.evaluation.generate import evaluate, generate_answers
from sbft.evaluation.likelihood import evaluate_loss
from sbft.metrics.accuracy.accuracy import first_label
from sbft.metrics.exact_match.exact_match import final_answer, is_match
from tests.tiny import KINDS, tiny_model, tiny_tokenizer

ROWS = Dataset.from_list(
    [{"prompt": "What is " + "the fox " * n, "completion": f"The answer is {n}."} for n in (1, 9, 3, 2, 6, 4)]
)
TEXTS = Dataset.from_list([{"text": "the quick brown fox " * n} for n in (1, 5, 3)])


def plain_loss(model: Any, formatted: Dataset) -> float:
    """The mean loss over all labels, from all logits, one row at a time."""
    total, count = 0.0, 0
    for row in formatted:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["completions", "texts"])
def test_loss_is_the_mean_over_labels_however_batched(kind: str, rows: Dataset) -> None:
    model, tokenizer = tiny_model(kind, dtype=torch.float32), tiny_tokenizer()
    collator = Collator(tokenizer.pad_token_id)
    formatted, _ = format_dataset(rows, tokenizer, max_length=90)
    packed, _ = format_dataset(rows, tokenizer, max_length=90, packing=True)
    expected = plain_loss(model, formatted)
    for data, batch_size in ((formatted, 1), (formatted, 4), (packed, 2)):
        measured = evaluate_loss(model, data, collator, batch_size=batch_size)
        assert measured["loss"] == pytest.approx(expected, rel=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_within_their_bounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(kind, dtype=torch.float32), tiny_tokenizer()
    collator = Collator(tokenizer.pad_token_id)
    formatted, _ = format_dataset(TEXTS, tokenizer)
    packed, _ = format_dataset(TEXTS, tokenizer, packing=True)
    expected = plain_loss(model, formatted)
    bound = 7 * 512 * 4  # 7 rows of logits: fewer than each text has tokens
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", bound)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.numel() * 4))
    for data in (formatted, packed):
        assert evaluate_loss(model, data, collator)["loss"] == pytest.approx(expected, rel=1e-5)
    assert max(sizes) <= bound < max(len(row["input_ids"]) for row in formatted) * 512 * 4


def test_logits_of_prompt_tokens_are_never_made() -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output[..., 0].numel())
    )
    formatted, report = format_dataset(ROWS, tokenizer)
    evaluate_loss(model, formatted, Collator(tokenizer.pad_token_id), batch_size=1)
    assert sum(rows) == report.completion_tokens
    rows.clear()
    prompts = encode_prompts(ROWS, tokenizer)
    generate_answers(model, tokenizer, prompts, max_new_tokens=3, batch_size=2)
    assert sum(rows) <= 3 * len(prompts)


def test_the_models_mode_and_gradients_are_left_as_they_were() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train()
    result = evaluate(model, tokenizer, ROWS, metrics=["exact_match"], max_new_tokens=2)
    assert model.training and torch.is_grad_enabled()
    assert set(result) == {"loss", "perplexity", "exact_match"}
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_batching_and_keep_their_order(kind: str) -> None:
    model, tokenizer = tiny_model(kind, dtype=torch.float32, seed=3), tiny_tokenizer()
    prompts = encode_prompts(ROWS, tokenizer)
    expected = []
    for prompt in prompts:  # greedy decoding by hand
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    for batch_size in (1, 4, 16):
        assert generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size) == expected


def test_the_head_sees_contiguous_inputs_and_no_hook_stays() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    seen = []
    head: Any = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    generate_answers(model, tokenizer, encode_prompts(ROWS, tokenizer), max_new_tokens=2, batch_size=4)
    assert len(seen) > 1 and all(seen)
    assert not head._forward_pre_hooks


def test_checkpoints_that_ask_for_sampling_are_still_greedy() -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    prompts = encode_prompts(ROWS, tokenizer)
    greedy = generate_answers(model, tokenizer, prompts, max_new_tokens=5)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=20)
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=5) == greedy


def test_answers_stop_at_the_end_of_the_turn() -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    (free,) = generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8)
    first = tokenizer(free, add_special_tokens=False).input_ids[0]
    model.generation_config.eos_token_id = [first]
    (stopped,) = generate_answers(model, tokenizer, [[5, 6, 7]], max_new_tokens=8)
    assert len(stopped) < len(free) and free.startswith(stopped)


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="Prompt 2 is empty"):
        generate_answers(tiny_model(), tiny_tokenizer(None), [[1], []], max_new_tokens=1)


def test_predictions_are_written_one_a_line(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    path = tmp_path / "new" / "predictions.jsonl"
    result = evaluate(model, tokenizer, ROWS, metrics=["exact_match"], limit=4, max_new_tokens=2, predictions_path=path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ROWS["prompt"][:4]
    assert [line["reference"] for line in lines] == ROWS["completion"][:4]
    assert set(lines[0]) == {"prompt", "reference", "prediction", "exact_match"}
    assert result["exact_match"] == sum(line["exact_match"] for line in lines) / 4
    assert list(path.parent.iterdir()) == [path]


def test_right_answers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["The answer is 1.", "wrong", " the answer is 3.", "The answer is 2.", "", "The answer is 4"]
    monkeypatch.setattr(evaluation, "generate_answers", lambda *args, **kwargs: answers)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert evaluate(model, tokenizer, ROWS, metrics=["exact_match"])["exact_match"] == 2 / 6
    options = {"exact_match": {"ignore_case": True, "ignore_punctuation": True}}
    result = evaluate(model, tokenizer, ROWS, metrics=["exact_match"], metric_options=options)
    assert result["exact_match"] == pytest.approx(4 / 6)


def test_conversations_are_asked_for_their_last_answer(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = tmp_path / "predictions.jsonl"
    rows = Dataset.from_list([{"messages": chat}])
    evaluate(tiny_model(), tiny_tokenizer(), rows, metrics=["exact_match"], max_new_tokens=1, predictions_path=path)
    line = json.loads(path.read_text(encoding="utf-8"))
    assert (line["prompt"], line["reference"]) == ("c", "d")


def test_rows_without_a_right_answer_are_refused_where_answers_are_scored() -> None:
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}])
    with pytest.raises(DataError, match="1 of 2 rows .* have no right answer, the first of them row 2"):
        evaluate(tiny_model(), tiny_tokenizer(), rows, metrics=["exact_match"])
    assert "loss" in evaluate(tiny_model(), tiny_tokenizer(), rows, metrics=[])


def test_text_has_a_loss_and_no_answers() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert set(evaluate(model, tokenizer, TEXTS, metrics=["perplexity"])) == {"loss", "perplexity", "bits_per_byte"}
    with pytest.raises(DataError, match=r"plain text.*evaluation.metrics: \[\]"):
        evaluate(model, tokenizer, TEXTS, metrics=["exact_match"])


def test_unknown_metrics_are_refused_before_anything_runs() -> None:
    with pytest.raises(DataError, match="no metric 'exact_matches'; there are accuracy, exact_match.*Did you mean"):
        evaluate(None, None, ROWS, metrics=["exact_matches"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 42 \n", "42"),
        ("12 + 30 = 42 #### 42", "42"),
        ("#### 1 #### 2 ", "2"),
        ("#### 5\n\nQuestion: what else?", "5"),
        (r"so \boxed{1} and \boxed{ 7 }", "7"),
        (r"hence \boxed{\frac{1}{2}} or {x}", r"\frac{1}{2}"),
        (r"cut off: \boxed{\frac{1}", r"\frac{1}"),
        ("a  b\nc", "a b c"),
        ("-5", "-5"),
    ],
)
def test_final_answers(text: str, expected: str) -> None:
    assert final_answer(text) == expected


def test_final_answers_after_given_words() -> None:
    assert is_match("So x = 18.\nThe answer is: 18.\nDone", "#### 18", answer_after="The answer is:")
    assert not is_match("The answer is: 18", "#### 18")
    assert not is_match("The answer is: 18\nThe answer is: 19", "18", answer_after="The answer is:")


def test_numbers_are_compared_as_numbers_where_asked() -> None:
    for same in ("18", "$18", "18.00", "18%", "18."):
        assert is_match(f"The answer is: {same}", "#### 18", answer_after="The answer is:", numeric=True)
    assert is_match("1,000", "1000", numeric=True) and not is_match("1,000", "1000")
    assert not is_match("18.5", "18", numeric=True)
    assert is_match("eighteen", "eighteen", numeric=True) and not is_match("eighteen", "18", numeric=True)


def test_an_empty_answer_matches_nothing() -> None:
    assert not is_match(r"\boxed{5} ####", r"\boxed{7} ####") and not is_match("", "")


def test_matches_are_exact_unless_told_otherwise() -> None:
    assert is_match("5", " 5") and not is_match("-5", "5") and not is_match("5.0", "5") and not is_match("", "5")
    assert not is_match("Yes", "yes") and is_match("Yes", "yes", ignore_case=True)
    assert not is_match("yes.", "yes") and is_match("yes.", "yes", ignore_punctuation=True)
    assert not is_match("-5.", "5", ignore_punctuation=True)


def test_labels_are_whole_words_and_the_first_counts() -> None:
    labels = ["no", "not sure", "yes"]
    assert first_label("Yes, not no", labels) == "yes"
    assert first_label("notably yes", labels) == "yes"
    assert first_label("not sure", labels) == "not sure"
    assert first_label("maybe", labels) is None
    assert metrics.compute("accuracy", ["Yes, it is", "yes", "?", "no"], ["yes", "no", "no", "no"]) == 0.5


def test_metrics_load_without_network_or_home(tmp_path: Path) -> None:
    """A fresh process with an empty home, without the hub, and in another folder."""
    import os
    import subprocess
    import sys

    code = "from sbft.metrics import compute; print(compute('exact_match', ['a', 'b'], ['a', 'c']))"
    root = Path(evaluation.__file__).parents[2]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ}
    environment = {**kept, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0.5"
