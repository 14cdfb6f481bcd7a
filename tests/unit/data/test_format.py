"""Rows to tokens: what is trained on, what is cut, and that evaluation asks questions as training does."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sbft.data.format import encode_answers, encode_prompts, format_dataset, stop_tokens
from sbft.data.rendering import Rendering
from sbft.errors import DataError
from tests.tiny import BOS, CHATML, CHATML_WITHOUT_MARKERS, EOS, tiny_tokenizer

# Renders earlier answers differently from the last one, as Qwen3 does with its thinking.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Ends turns with words, not with a special token.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Also ends conversations (Phi-3), and opens answers with special tokens (gpt-oss).
WORDY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>final' }}{% endif %}"
    "{{ '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant' if add_generation_prompt else '<|bos|>' }}"
)
CHAT = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "The answer is 42."},
    {"role": "user", "content": "and the fox?"},
    {"role": "assistant", "content": " It jumps.\nIt sleeps."},
]


def trained_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    assert len(row["input_ids"]) == len(row["labels"])
    kept = [label for label in row["labels"] if label != -100]
    assert kept == [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    return tokenizer.decode(kept)


def one(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> dict[str, Any]:
    return format_dataset(Dataset.from_list([row]), tokenizer, **options)[0][0]


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def test_completion_alone_is_trained_on_and_ends_its_turn() -> None:
    tokenizer = tiny_tokenizer()
    row = one({"prompt": "What is 1?", "completion": "one"}, tokenizer)
    text = "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\none<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == text
    assert trained_text(row, tokenizer) == "one<|im_end|>"


def test_without_a_chat_template_texts_stand_as_they_are() -> None:
    tokenizer = with_bos()
    row = one({"prompt": "Q: 1 A:", "completion": " one"}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == f"{BOS}Q: 1 A: one{EOS}"
    assert trained_text(row, tokenizer) == f" one{EOS}"
    tokenizer.chat_template = CHATML
    assert one({"prompt": "Q: 1 A:", "completion": " one"}, tokenizer, chat_template=False) == row


def test_system_turn_and_renamed_columns() -> None:
    tokenizer = tiny_tokenizer()
    row = one({"q": "a", "a": 7}, tokenizer, prompt="q", completion="a", system="be brief")
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na")
    assert trained_text(row, tokenizer) == f"7{EOS}"


def test_text_is_trained_on_but_for_its_first_token() -> None:
    tokenizer = tiny_tokenizer()
    row = one({"text": "The quick brown fox"}, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == f"The quick brown fox{EOS}"
    assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, "The answer is 42.<|im_end|> It jumps.\nIt sleeps.<|im_end|>"),
        (CHATML_WITHOUT_MARKERS, "The answer is 42.<|im_end|> It jumps.\nIt sleeps.<|im_end|>"),
        (FORGETFUL, "The answer is 42.<|im_end|>It jumps.\nIt sleeps.<|im_end|>"),
        (PLAIN, f"The answer is 42.\n It jumps.\nIt sleeps.\n{EOS}"),
        (WORDY, "<|im_start|>final\nThe answer is 42.<|im_end|><|im_start|>final\n It jumps.\nIt sleeps.<|im_end|>"),
    ],
    ids=["markers", "prefixes", "forgetful", "plain", "wordy"],
)
def test_only_assistant_turns_are_trained_on(template: str, answers: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = one({"messages": CHAT}, tokenizer)
    assert trained_text(row, tokenizer) == answers
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip("\n")
    assert tokenizer.decode(row["input_ids"]).rstrip("\n").startswith(whole.removesuffix("<|bos|>").rstrip("\n"))


def test_answers_end_with_the_token_after_their_own_words() -> None:
    tokenizer = tiny_tokenizer(WORDY)
    row = one({"prompt": "a", "completion": "b"}, tokenizer)
    assert trained_text(row, tokenizer) == "<|im_start|>final\nb<|im_end|>"
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id]


def test_stop_tokens_hold_the_end_of_turn_and_of_text() -> None:
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", "<|bos|>"))
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert stop_tokens(tiny_tokenizer(PLAIN)) == stop_tokens(tiny_tokenizer(None)) == [1]


ROWS = [{"prompt": p, "completion": c} for p, c in [("a b", "c"), ("x\n", "\n\ny"), (" lead", " 12 30"), ("é", "ü")]]


@pytest.mark.parametrize("template", [None, CHATML, CHATML_WITHOUT_MARKERS, FORGETFUL, PLAIN, WORDY])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_prompts_are_put_token_for_token_as_in_training(template: str | None, system: str | None) -> None:
    for tokenizer in (tiny_tokenizer(template), with_bos()):
        trained, _ = format_dataset(Dataset.from_list(ROWS), tokenizer, system=system)
        asked = encode_prompts(Dataset.from_list(ROWS), tokenizer, system=system)
        assert asked == encode_prompts([{"prompt": row["prompt"]} for row in ROWS], tokenizer, system=system)
        for row, prompt in zip(trained, asked, strict=True):
            answer_begins = next(i for i, label in enumerate(row["labels"]) if label != -100)
            assert prompt == row["input_ids"][:answer_begins]


@pytest.mark.parametrize("template", [None, CHATML, CHATML_WITHOUT_MARKERS, FORGETFUL, PLAIN, WORDY])
def test_answers_are_put_token_for_token_as_in_training(template: str | None) -> None:
    answers = ["c", "\n\ny", " 12 30"]
    for tokenizer in (tiny_tokenizer(template), with_bos()):
        rows = [{"prompt": row["prompt"], "completion": answer} for row in ROWS for answer in answers]
        trained, _ = format_dataset(Dataset.from_list(rows), tokenizer, system="be brief")
        rendering = Rendering(system="be brief")
        put = encode_answers(Dataset.from_list(ROWS), tokenizer, answers, rendering)
        assert put == trained.to_list()
        assert put == encode_answers([{"prompt": row["prompt"]} for row in ROWS], tokenizer, answers, rendering)


def test_only_the_last_answer_of_a_conversation_is_replaced() -> None:
    tokenizer = tiny_tokenizer()
    (own, other) = encode_answers([{"messages": CHAT}], tokenizer, [CHAT[-1]["content"], "no"])
    assert own["input_ids"] == one({"messages": CHAT}, tokenizer)["input_ids"]
    assert trained_text(own, tokenizer) == " It jumps.\nIt sleeps.<|im_end|>"
    assert trained_text(other, tokenizer) == "no<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_MARKERS, FORGETFUL, PLAIN, WORDY])
def test_conversations_are_put_token_for_token_as_in_training(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = one({"messages": CHAT}, tokenizer)
    (asked,) = encode_prompts([{"messages": CHAT}], tokenizer)
    trailing = next(i for i, label in enumerate(row["labels"][::-1]) if label != -100)  # what Phi-3 adds at the end
    trained_to = len(row["labels"]) - trailing
    last_answer_begins = max(i for i, label in enumerate(row["labels"][:trained_to]) if label == -100) + 1
    assert asked == row["input_ids"][:last_answer_begins]
    assert asked == encode_prompts([{"messages": CHAT[:-1]}], tokenizer)[0]


def test_prompt_tokens_are_those_of_the_chat_template_itself() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompts([{"prompt": CHAT[0]["content"]}], tokenizer) == [plain]


def test_cut_examples_are_counted_and_those_without_an_answer_dropped() -> None:
    tokenizer = tiny_tokenizer(None)
    rows = [
        {"prompt": "ab", "completion": "c"},  # 2 + 1 + end: whole
        {"prompt": "ab", "completion": "cdefghij"},  # cut
        {"prompt": "abcdefgh", "completion": "i"},  # no answer left
        {"prompt": "ab", "completion": " "},
        {"prompt": "ab", "completion": None},
    ]
    lengths = [len(tokenizer(row["prompt"] + (row["completion"] or "")).input_ids) for row in rows[:3]]
    assert lengths[0] + 1 <= 6 < lengths[1] and len(tokenizer("abcdefgh").input_ids) >= 6
    data, report = format_dataset(Dataset.from_list(rows), tokenizer, max_length=6)
    assert (report.examples, report.truncated, report.dropped, report.empty) == (2, 1, 1, 2)
    assert [len(row["input_ids"]) for row in data] == [4, 6]
    assert report.tokens == 10 and report.longest == 6 and report.packed_into is None
    assert report.completion_tokens == 2 + 4
    assert data[0]["labels"][-1] == tokenizer.eos_token_id != data[1]["labels"][-1]


def test_nothing_left_is_refused() -> None:
    rows = Dataset.from_list([{"prompt": "abcdefgh", "completion": "i"}] * 3)
    with pytest.raises(DataError, match="No example is left: of 3 rows"):
        format_dataset(rows, tiny_tokenizer(None), max_length=4)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"question": "a", "answer": "b"}, {}, "'question', 'answer'; expected 'prompt' with 'completion'"),
        ({"prompt": "a", "answer": "b"}, {}, "'prompt' is there without its other half"),
        ({"q": "a", "answer": "b"}, {"prompt": "q"}, "expected 'q' with 'completion'"),
        ({"messages": ["hello"]}, {}, "holds 'hello'; expected a list of messages"),
    ],
)
def test_wrong_columns_are_named(row: dict, options: dict, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        format_dataset(Dataset.from_list([row]), tiny_tokenizer(), **options)


def test_messages_need_a_chat_template_that_takes_them() -> None:
    data = Dataset.from_list([{"messages": CHAT}])
    with pytest.raises(DataError, match="no chat template"):
        format_dataset(data, tiny_tokenizer(None))
    with pytest.raises(DataError, match="refuses a conversation with the roles user, assistant.*no thanks"):
        format_dataset(data, tiny_tokenizer("{{ raise_exception('no thanks') }}"))


def test_more_rows_than_one_chunk() -> None:
    rows = Dataset.from_list([{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(2_300)])
    data, report = format_dataset(rows, tiny_tokenizer(None))
    assert report.examples == data.num_rows == 2_300
    assert tiny_tokenizer().decode(data[2_299]["input_ids"]) == f"22992300{EOS}"


def test_conversations_without_an_answer_are_counted_by_themselves() -> None:
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": []}, {"messages": None}])
    _, report = format_dataset(rows, tiny_tokenizer())
    assert (report.examples, report.unanswered, report.empty, report.dropped) == (1, 1, 2, 0)
    with pytest.raises(DataError, match="of 1 rows 1 had no turn of the assistant"):
        format_dataset(rows.select([1]), tiny_tokenizer())


def test_messages_that_are_text_are_refused_with_what_is_expected() -> None:
    with pytest.raises(DataError, match=r"is a str, 'hello'; expected a list of messages"):
        format_dataset(Dataset.from_list([{"messages": "hello"}]), tiny_tokenizer())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": {"a": 1}, "completion": "x"}, "value of 'prompt' is a dict, .*; expected text"),
        ({"prompt": "a", "completion": ["x"]}, "value of 'completion' is a list"),
        ({"text": b"\xff"}, "value of 'text' is a bytes"),
        ({"messages": [{"role": None, "content": "a"}]}, "holds .*; expected a list of messages"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "has the content .*; expected text"),
        ({"messages": [{"role": "user", "content": [{"a": 1}]}]}, r"has the content \[{'a': 1}\]; expected text"),
    ],
)
def test_what_is_no_text_is_refused(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        one(row, tiny_tokenizer())


def test_a_missing_number_is_a_missing_text() -> None:
    rows = Dataset.from_list([{"prompt": float("nan"), "completion": "a"}, {"prompt": 1.5, "completion": "b"}])
    formatted, report = format_dataset(rows, tiny_tokenizer(None))
    assert (report.examples, report.empty) == (1, 1) and tiny_tokenizer().decode(formatted[0]["input_ids"]).startswith(
        "1.5"
    )
