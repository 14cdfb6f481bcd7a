"""Labels by their likelihood, against log-softmax by hand; the loss of correct answers is tested in test_generate.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from sbft.data.format import encode_answers, format_dataset
from sbft.data.rendering import Rendering
from sbft.errors import DataError
from sbft.evaluation import likelihood
from sbft.evaluation.generate import evaluate
from sbft.evaluation.likelihood import label_likelihoods
from tests.tiny import CHATML, CHATML_WITHOUT_MARKERS, tiny_model, tiny_tokenizer

LABELS = ["no", "not sure", "The quick brown fox", "7"]
PROMPTS = [{"prompt": "Is the fox lazy? " * n} for n in (1, 5, 2, 3)]


def by_hand(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of an answer's tokens after a prompt, from all logits of one unpadded sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(sum(row[token] for row, token in zip(log_probabilities, answer, strict=True)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3"])
@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_scores_are_those_of_each_label_alone(kind: str, template: str | None) -> None:
    model, tokenizer = tiny_model(kind, dtype=torch.float64, seed=1), tiny_tokenizer(template)
    expected = []
    for row in PROMPTS:
        text = row["prompt"]
        if template:
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text).input_ids
        answers = [[*tokenizer(label).input_ids, tokenizer.eos_token_id] for label in LABELS]
        expected.append([by_hand(model, prompt, answer) for answer in answers])
    for batch_size in (1, 3, 16):
        scores = label_likelihoods(model, tokenizer, PROMPTS, LABELS, batch_size=batch_size)
        assert scores.shape == (4, 4) and scores.dtype == torch.float64
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_border_of_prompt_and_label_is_that_of_training() -> None:
    model, tokenizer = tiny_model(dtype=torch.float64), tiny_tokenizer(None)
    prompt, label = "The quick bro", "wn fox"
    apart = [*tokenizer(prompt).input_ids, *tokenizer(label).input_ids]
    assert apart != tokenizer(prompt + label).input_ids
    trained, _ = format_dataset(Dataset.from_list([{"prompt": prompt, "completion": label}]), tokenizer)
    assert trained[0]["input_ids"] == [*apart, tokenizer.eos_token_id]
    answer = [*tokenizer(label).input_ids, tokenizer.eos_token_id]
    (scores,) = label_likelihoods(model, tokenizer, [{"prompt": prompt}], [label, "x"])
    assert scores[0].item() == pytest.approx(by_hand(model, tokenizer(prompt).input_ids, answer), rel=1e-6)


def test_scores_are_minus_the_loss_that_training_on_the_label_would_begin_with() -> None:
    model, tokenizer = tiny_model("gemma3", dtype=torch.float32), tiny_tokenizer()
    rows = [{"prompt": row["prompt"], "completion": label} for row in PROMPTS for label in LABELS]
    formatted, _ = format_dataset(Dataset.from_list(rows), tokenizer, system="be brief")
    losses = []
    for row in formatted:
        with torch.no_grad():
            loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        losses.append(-loss.item() * sum(label != -100 for label in row["labels"]))
    scores = label_likelihoods(model, tokenizer, PROMPTS, LABELS, Rendering(system="be brief"))
    torch.testing.assert_close(scores.flatten(), torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_MARKERS], ids=["markers", "prefixes"])
def test_labels_take_the_place_of_a_conversations_last_answer(template: str) -> None:
    model, tokenizer = tiny_model(dtype=torch.float64), tiny_tokenizer(template)
    turns = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "It jumps."}]
    chat = [*turns, {"role": "user", "content": "Is it lazy?"}, {"role": "assistant", "content": "never"}]
    text = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text).input_ids
    expected = [by_hand(model, prompt, [*tokenizer(label).input_ids, tokenizer.eos_token_id]) for label in LABELS]
    for messages in (chat, chat[:-1]):
        (scores,) = label_likelihoods(model, tokenizer, [{"messages": messages}], LABELS)
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_label_that_begins_another_is_not_always_the_likelier_one() -> None:
    """A model that always continues after "no": without the end token, "no" would be the likelier label."""
    model, tokenizer = tiny_model(dtype=torch.float32, seed=2), tiny_tokenizer(None)
    prompt, labels = "Is it?", ["no", "not sure"]
    ids = [[*tokenizer(label).input_ids, tokenizer.eos_token_id] for label in labels]
    assert ids[1][: len(ids[0]) - 1] == ids[0][:-1]  # one is a prefix of the other, in tokens too
    rows = Dataset.from_list([{"prompt": prompt, "completion": "not sure"}])
    formatted, _ = format_dataset(rows, tokenizer)
    batch = {name: torch.tensor([formatted[0][name]]) for name in ("input_ids", "labels")}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (scores,) = label_likelihoods(model, tokenizer, [{"prompt": prompt}], labels)
    assert scores[1] > scores[0]
    assert by_hand(model, tokenizer(prompt).input_ids, ids[0][:-1]) > scores[1]


def test_logits_are_made_for_labels_alone_and_stay_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    prompts = [{"prompt": "the fox " * n} for n in range(10, 20)]
    expected = label_likelihoods(model, tokenizer, prompts, LABELS)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output[..., 0].numel())
    )
    label_likelihoods(model, tokenizer, prompts[:1], LABELS)
    answer_tokens = max(len(tokenizer(label).input_ids) for label in LABELS) + 1
    assert sum(sizes) <= len(LABELS) * answer_tokens
    sizes.clear()
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 20 * 4 * 512)
    monkeypatch.setattr(likelihood, "_CANDIDATES_AT_A_TIME", 12)
    bounded = label_likelihoods(model, tokenizer, prompts, LABELS)
    torch.testing.assert_close(bounded, expected, rtol=1e-5, atol=0)
    assert max(sizes) <= 20 and len(sizes) > len(prompts) * len(LABELS) * answer_tokens / 40


def test_nothing_is_cut() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    candidates = encode_answers(PROMPTS, tokenizer, LABELS)
    longest = max(len(row["input_ids"]) for row in candidates)
    assert label_likelihoods(model, tokenizer, PROMPTS, LABELS, max_length=longest).shape == (4, 4)
    with pytest.raises(DataError, match=rf"Row 2 .*'not sure' has {longest} tokens.*Raise data.max_length"):
        label_likelihoods(model, tokenizer, PROMPTS, LABELS, max_length=longest - 1)


def test_the_row_that_is_too_long_is_numbered_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_CANDIDATES_AT_A_TIME", 2)
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "the lazy dog " * 9}]
    with pytest.raises(DataError, match="Row 3 of the evaluation data with the label 'no'"):
        label_likelihoods(tiny_model(), tiny_tokenizer(), rows, ["no", "yes"], max_length=25)


@pytest.mark.parametrize(
    ("rows", "labels", "expected"),
    [
        (PROMPTS, ["no", " "], "is ' '; expected at least one word"),
        (PROMPTS, ["no", "no"], "'no' and 'no' are the same tokens"),
        ([{"text": "a"}], ["no", "yes"], "plain text, which has no answers"),
        ([{"prompt": None}], ["no", "yes"], "no question in 'prompt'"),
        ([{"messages": []}], ["no", "yes"], "no question in 'messages'"),
        ([{"question": "a"}], ["no", "yes"], "has the columns 'question'"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows: list[dict], labels: list[str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        label_likelihoods(tiny_model(), tiny_tokenizer(), rows, labels)


def test_labels_that_a_template_renders_alike_are_refused() -> None:
    trimming = CHATML_WITHOUT_MARKERS.replace("message['content'] +", "(message['content'] | trim) +")
    with pytest.raises(DataError, match="'no' and ' no' are the same tokens once they are rendered"):
        label_likelihoods(tiny_model(), tiny_tokenizer(trimming), PROMPTS, ["no", " no"])


def test_no_rows_have_no_scores() -> None:
    assert label_likelihoods(tiny_model(), tiny_tokenizer(), [], LABELS).shape == (0, 4)


ROWS = Dataset.from_list([{"prompt": f"fox {i}?", "completion": ("yes", "no", "maybe")[i % 3]} for i in range(7)])


def learned() -> Any:
    """A tiny model that has learned to answer `ROWS`."""
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    formatted, _ = format_dataset(ROWS, tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        for row in formatted:
            model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def test_accuracy_counts_the_likeliest_label(tmp_path: Path) -> None:
    model, tokenizer, path = learned(), tiny_tokenizer(), tmp_path / "predictions.jsonl"
    result = evaluate(model, tokenizer, ROWS, metrics=[], labels="auto", predictions_path=path)
    assert set(result) == {"loss", "perplexity", "label_accuracy"} and result["label_accuracy"] == 1.0
    swapped = ROWS.map(lambda row: {"completion": "yes"})
    labels = ["maybe", "no", "yes"]
    result = evaluate(model, tokenizer, swapped, metrics=["label_accuracy"], labels=labels, predictions_path=path)
    assert result["label_accuracy"] == pytest.approx(3 / 7)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ROWS["completion"]
    assert [line["label_match"] for line in lines] == [row == "yes" for row in ROWS["completion"]]
    scores = label_likelihoods(model, tokenizer, ROWS, labels)
    assert [line["log_probabilities"] for line in lines] == [
        dict(zip(labels, of_row, strict=True)) for of_row in scores.tolist()
    ]
    assert set(lines[0]) == {"prompt", "reference", "label", "label_match", "log_probabilities"}


def test_labels_stand_beside_generated_answers(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    result = evaluate(
        learned(),
        tiny_tokenizer(),
        ROWS,
        metrics=["label_accuracy", "exact_match"],
        labels="auto",
        limit=2,
        max_new_tokens=4,
        predictions_path=path,
    )
    assert result["label_accuracy"] == result["exact_match"] == 1.0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["prediction"], line["label"]) for line in lines] == [("yes", "yes"), ("no", "no")]
    # The third answer is beyond the limit, but is a label all the same.
    assert set(lines[0]["log_probabilities"]) == {"yes", "no", "maybe"}


def test_a_model_that_has_diverged_chooses_no_label(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "predictions.jsonl"
    torch.nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    result = evaluate(model, tiny_tokenizer(), ROWS, metrics=[], labels="auto", predictions_path=path)
    assert result["label_accuracy"] == 0.0
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert line["label"] is None and set(line["log_probabilities"].values()) == {None}


@pytest.mark.parametrize(
    ("completions", "labels", "expected"),
    [
        (["yes", "no"], ["yes", "nope"], "row 2 of the evaluation data is 'no', .* not among the labels 'yes', 'nope'"),
        (["yes", "No "], ["yes", "no"], "White space and case matter: 'no' is a different label"),
        (["yes", None, "no"], "auto", "row 2 of the evaluation data is ''"),
        (["yes", "yes"], "auto", "only one answer, 'yes'; expected 2 to 50"),
        ([f"{i}" for i in range(51)], "auto", "51 different answers; expected 2 to 50"),
        (["yes", "no"], ["yes"], "expected at least two different labels"),
        (["yes", "no"], ["yes", "no", "no"], "expected at least two different labels"),
        (["yes", "no"], "yes", "is 'yes'; expected a list of labels, or auto"),
    ],
)
def test_wrong_labels_are_refused_before_anything_runs(completions: list, labels: Any, expected: str) -> None:
    rows = Dataset.from_list([{"prompt": f"{i}", "completion": value} for i, value in enumerate(completions)])
    with pytest.raises(DataError, match=expected):
        evaluate(None, None, rows, metrics=[], labels=labels)  # type: ignore[arg-type]


def test_label_accuracy_needs_labels_and_answers() -> None:
    with pytest.raises(DataError, match="label_accuracy needs labels.*evaluation.labels: auto"):
        evaluate(None, None, ROWS, metrics=["label_accuracy"])  # type: ignore[arg-type]
    texts = Dataset.from_list([{"text": "a"}])
    with pytest.raises(DataError, match="no right answers that label_accuracy could score"):
        evaluate(None, None, texts, metrics=[], labels="auto")  # type: ignore[arg-type]


def test_bits_per_byte_are_all_nats_over_all_bytes_that_were_predicted() -> None:
    model, tokenizer = tiny_model(dtype=torch.float64, seed=1), tiny_tokenizer(None)
    texts = ["The quick brown fox", "Die Größe zählt: 0 1 2 3", "x 日本"]
    nats, size = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        nats -= by_hand(model, ids[:1], ids[1:])
        # Each character of a byte-level token stands for a byte; the first token is given, and the last has no text.
        size += sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids[1:-1]))
    for options in ({}, {"batch_size": 1}):
        measured = evaluate(
            model, tokenizer, Dataset.from_list([{"text": text} for text in texts]), metrics=[], **options
        )
        assert list(measured) == ["loss", "perplexity", "bits_per_byte"]
        assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_bits_per_byte_are_of_plain_text_alone() -> None:
    rows = Dataset.from_list([{"prompt": "Count.", "completion": "0 1 2"}])
    with pytest.raises(DataError, match="bits_per_byte is of plain text"):
        evaluate(tiny_model(), tiny_tokenizer(None), rows, metrics=["bits_per_byte"])
