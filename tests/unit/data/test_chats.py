"""Chats as data sets write them: tools, reasoning, weights, ShareGPT, Alpaca; nothing is dropped without a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sbft.data.files import read_file
from sbft.data.format import encode_answers, encode_prompts, format_dataset
from sbft.data.overlap import questions
from sbft.errors import DataError
from tests.tiny import BOS, CHATML, CHATML_WITHOUT_MARKERS, EOS, tiny_tokenizer

USER = {"role": "user", "content": "2+2?"}
# Tools, calls and reasoning as in Qwen 3: reasoning is kept only after the last question.
RICH = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% elif loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Opens a thought in the generation prompt, and renders none in answers (DeepSeek-R1).
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def learned(rows: list[dict[str, Any]] | Dataset, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[str]:
    """The text that bears loss in each example."""
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    examples, _ = format_dataset(data, tokenizer, max_length=4_096, **options)
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in examples]


def text_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    return tokenizer.decode(format_dataset(Dataset.from_list([row]), tokenizer, **options)[0][0]["input_ids"])


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}], **more}


TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "sub", "parameters": {"properties": {"b": {"default": None}}}}},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("from_file", [True, False])
def test_keys_that_a_row_lacks_are_absent_at_every_depth(from_file: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(RICH)
    rows = [
        {"messages": [USER, calling(arguments)], "tools": [tool]}
        for arguments, tool in zip([{"a": {"x": 1}}, {"b": [{"y": "2"}]}, {}], [*TOOLS, TOOLS[0]], strict=True)
    ]
    data = read_file(write(tmp_path / "a.jsonl", rows)) if from_file else Dataset.from_list(rows)
    assert learned(data, tokenizer) == [
        f'<call>add{{"a": {{"x": 1}}}}</call>{EOS}',
        f'<call>add{{"b": [{{"y": "2"}}]}}</call>{EOS}',
        f"<call>add{{}}</call>{EOS}",
    ]
    texts = [tokenizer.decode(row["input_ids"]) for row in format_dataset(data, tokenizer)[0]]
    assert json.dumps([TOOLS[0]]) in texts[0] and json.dumps([TOOLS[0]]) in texts[2]
    # A null in a file stays null; in a table of objects it cannot be distinguished from an absent key.
    assert (json.dumps([TOOLS[1]]) in texts[1]) is from_file


def test_null_that_is_meant_is_kept_where_it_can_be_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(RICH)
    rows = [{"messages": [USER, calling({"unit": None, "city": "Oslo"})]}, {"messages": [USER, calling({"day": 1})]}]
    expected = [f'<call>add{{"unit": null, "city": "Oslo"}}</call>{EOS}', f'<call>add{{"day": 1}}</call>{EOS}']
    assert learned(read_file(write(tmp_path / "a.jsonl", rows)), tokenizer) == expected
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert learned(read_file(tmp_path / "a.json"), tokenizer) == expected
    assert learned([{"messages": [USER, calling('{"unit": null, "city": "Oslo"}')]}], tokenizer) == expected[:1]


@pytest.mark.parametrize("tools", [TOOLS[:1], json.dumps(TOOLS[:1]), [json.dumps(TOOLS[0])], TOOLS[0]])
def test_tools_reach_the_template_where_it_is_trained_and_asked(tools: Any) -> None:
    tokenizer = tiny_tokenizer(RICH)
    chat = {"messages": [USER, calling({"a": 1}), {"role": "tool", "content": "4"}, {"role": "assistant", "content": "4"}]}
    for row in ({**chat, "tools": tools}, {"prompt": "2+2?", "completion": "4", "tools": tools}):
        (example,), (asked,) = format_dataset(Dataset.from_list([row]), tokenizer)[0], encode_prompts([row], tokenizer)
        assert tokenizer.decode(asked).startswith(f"<|im_start|>system\n{json.dumps(TOOLS[:1])}<|im_end|>")
        assert example["input_ids"][: len(asked)] == asked
        (put,) = encode_answers([row], tokenizer, ["5"])
        assert put["input_ids"][: len(asked)] == asked
    renamed = {"messages": chat["messages"], "functions": tools}
    assert '"add"' in text_of(renamed, tokenizer, tools="functions").split("<|im_end|>")[0]


def test_a_template_that_shows_no_tools_or_calls_is_refused() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "4"}], "tools": json.dumps(TOOLS)}
    with pytest.raises(DataError, match="does not show the model the tools.*data.tools"):
        learned([row], tiny_tokenizer())
    assert learned([row], tiny_tokenizer(), tools="none") == [f"4{EOS}"]
    with pytest.raises(DataError, match="leaves out the tool call's name of the assistant's turn"):
        learned([{"messages": [USER, calling({"a": 1})]}], tiny_tokenizer())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "has the tool call .*expected one such"),
        ({"role": "assistant", "content": "4", "weight": 0.5}, "has the weight 0.5; expected 1, or 0"),
        ({"role": "assistant", "content": [{"type": "image", "text": "x"}]}, "part of the type 'image'; expected text"),
    ],
)
def test_malformed_messages_are_refused(message: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        learned([{"messages": [message]}], tiny_tokenizer(RICH))


def test_tools_that_are_none_are_refused() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "4"}]}
    for tools, expected in (("add", "tools of a row are 'add'"), ('[{"x": 1}]', "has the tool {'x': 1}")):
        with pytest.raises(DataError, match=expected):
            learned([{**row, "tools": tools}], tiny_tokenizer(RICH))
    assert learned([{**row, "tools": None}, {**row, "tools": "[]"}], tiny_tokenizer()) == [f"4{EOS}"] * 2


@pytest.mark.parametrize("template", [CHATML, CHATML_WITHOUT_MARKERS, RICH])
def test_a_turn_of_weight_zero_bears_no_loss(template: str) -> None:
    turns = [("bad", 0), ("good", 1), ("plain", None)]
    chat = [part for text, weight in turns for part in (USER, {"role": "assistant", "content": text, "weight": weight})]
    tokenizer = tiny_tokenizer(template)
    assert learned([{"messages": chat}], tokenizer) == [f"good{EOS}plain{EOS}"]
    assert "bad" in text_of({"messages": chat}, tokenizer)
    with pytest.raises(DataError, match="no turn of the assistant to learn.*no weight of 0"):
        learned([{"messages": chat[:2]}], tokenizer)
    (asked,) = encode_prompts([{"messages": chat}], tokenizer)
    (example,) = format_dataset(Dataset.from_list([{"messages": chat}]), tokenizer)[0]
    assert example["input_ids"][: len(asked)] == asked


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "content"])
def test_reasoning_is_learned_and_asked_for_as_trained(key: str) -> None:
    tokenizer = tiny_tokenizer(RICH)
    answer: dict[str, Any] = {"role": "assistant", "content": "4"}
    answer |= {"content": "<think>\nhm\n</think>\n\n4"} if key == "content" else {key: "hm"}
    row = {"messages": [USER, answer]}
    assert learned([row], tokenizer) == [f"<think>\nhm\n</think>\n\n4{EOS}"]
    (example,), (asked,) = format_dataset(Dataset.from_list([row]), tokenizer)[0], encode_prompts([row], tokenizer)
    assert example["input_ids"][: len(asked)] == asked and tokenizer.decode(asked).endswith("assistant\n")
    # Earlier reasoning is not in the text of the whole chat: it gets an example of its own.
    twice, report = format_dataset(Dataset.from_list([{"messages": [USER, answer] * 2}]), tokenizer)
    assert report.divided == 1 and report.examples == 2
    texts = [tokenizer.decode([label for label in each["labels"] if label != -100]) for each in twice]
    assert texts == [f"<think>\nhm\n</think>\n\n4{EOS}"] * 2
    with pytest.raises(DataError, match="enable_thinking is false"):
        learned([row], tokenizer, chat_template_kwargs={"enable_thinking": False})


def test_thinking_follows_the_data_and_can_be_set() -> None:
    tokenizer = tiny_tokenizer(RICH)
    plain = {"prompt": "2+2?", "completion": "4"}
    assert learned([plain], tokenizer) == [f"4{EOS}"]
    (asked,) = encode_prompts([plain], tokenizer)
    assert tokenizer.decode(asked).endswith("</think>\n\n")
    assert learned([plain], tokenizer, chat_template_kwargs={"enable_thinking": True}) == [
        f"<think>\n\n</think>\n\n4{EOS}"
    ]
    # If one answer has reasoning, all questions are asked that way.
    both = [plain, {"prompt": "2+2?", "completion": "<think>\nhm\n</think>\n\n4"}]
    assert learned(both, tokenizer) == [f"<think>\n\n</think>\n\n4{EOS}", f"<think>\nhm\n</think>\n\n4{EOS}"]
    assert all(tokenizer.decode(each).endswith("assistant\n") for each in encode_prompts(both, tokenizer))


def test_reasoning_that_the_template_does_not_know_is_refused() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "4", "reasoning_content": "hm"}]}
    with pytest.raises(DataError, match="leaves out the reasoning of the assistant's turn.*<think>"):
        learned([row], tiny_tokenizer())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "4"}, "\n</think>\n\n4"),
        ({"content": "4", "reasoning_content": "hm"}, "hm\n</think>\n\n4"),
        ({"content": "<think>\nhm\n</think>\n\n4"}, "hm\n</think>\n\n4"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_put_in(answer: dict[str, Any], expected: str) -> None:
    tokenizer = tiny_tokenizer(OPENING)
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    assert learned([row], tokenizer) == [expected + EOS]
    (example,), (asked,) = format_dataset(Dataset.from_list([row]), tokenizer)[0], encode_prompts([row], tokenizer)
    assert example["input_ids"][: len(asked)] == asked and tokenizer.decode(asked).endswith("<think>\n")
    assert learned([{"messages": [USER, {"role": "assistant", **answer}] * 2}], tokenizer) == [expected + EOS] * 2


def test_a_turn_that_the_template_drops_is_refused() -> None:
    deaf = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'developer' %}")
    row = {"messages": [{"role": "developer", "content": "be brief"}, USER, {"role": "assistant", "content": "4"}]}
    with pytest.raises(DataError, match="leaves out the text of a turn of the role 'developer'"):
        learned([row], tiny_tokenizer(deaf))
    assert "be brief" in text_of(row, tiny_tokenizer())


def test_a_template_that_writes_a_turn_into_another_is_refused() -> None:
    """Gemma 4 does this when two turns of the assistant follow each other."""
    merging = (
        "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}"
        "{% if loop.last or m.role != messages[loop.index0 + 1].role %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answers = [{"role": "assistant", "content": text} for text in ("It is 4.", "Or so.")]
    with pytest.raises(DataError, match="writes the text of one turn of the assistant into another of its turns"):
        learned([{"messages": [USER, *answers]}], tiny_tokenizer(merging))
    assert learned([{"messages": [USER, *answers]}], tiny_tokenizer()) == [f"It is 4.{EOS}Or so.{EOS}"]


def test_a_thought_that_was_cut_off_is_refused() -> None:
    with pytest.raises(DataError, match="begins a thought that never ends: '<think>.nhm'"):
        learned([{"prompt": "2+2?", "completion": "<think>\nhm"}], tiny_tokenizer(RICH))


def test_a_value_that_the_template_changes_is_refused() -> None:
    cutting = CHATML_WITHOUT_MARKERS.replace("message['content'] +", "message['content'].split('#')[0] +")
    assert learned([{"messages": [USER, {"role": "assistant", "content": "4"}]}], tiny_tokenizer(cutting)) == [f"4{EOS}"]
    with pytest.raises(DataError, match="does not render the text of this answer as it is written: '4 # four'"):
        learned([{"messages": [USER, {"role": "assistant", "content": "4 # four"}]}], tiny_tokenizer(cutting))


def test_the_token_that_opens_the_next_turn_ends_one_without_an_end() -> None:
    unended = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    unended += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    answer = {"role": "assistant", "content": "4"}
    assert learned([{"messages": [USER, answer] * 2}], tiny_tokenizer(unended)) == [f"4<|im_start|>4{EOS}"]


def test_contents_in_parts_are_joined_also_for_templates_that_take_only_parts() -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
    rows = [{"messages": [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts}]}]
    assert learned(rows, tiny_tokenizer()) == [f"It is 4.{EOS}"]
    only = CHATML_WITHOUT_MARKERS.replace("message['content']", "(message['content'] | map(attribute='text') | join)")
    assert learned(rows, tiny_tokenizer(only)) == [f"It is 4.{EOS}"]
    assert learned([{"prompt": "2+2?", "completion": "4"}], tiny_tokenizer(only)) == [f"4{EOS}"]


def test_sharegpt_is_read() -> None:
    tokenizer = tiny_tokenizer(RICH)
    call = {"name": "add", "arguments": {"a": 2}}
    given = [("human", "2+2?"), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", "It is 4.")]
    row = {"conversations": [{"from": role, "value": value} for role, value in given]}
    assert learned([row], tokenizer) == [f'<call>add{{"a": 2}}</call>{EOS}It is 4.{EOS}']
    _, report = format_dataset(Dataset.from_list([row]), tokenizer)
    assert report.unread == ()
    assert list(questions(Dataset.from_list([row]))) == ["2+2?"]
    with pytest.raises(DataError, match="turn of function_call holds 'no'"):
        learned([{"conversations": [{"from": "function_call", "value": "no"}]}], tokenizer)
    # The problem is the roles, not the length.
    row = {"messages": [{"role": "bot", "content": "hello"}]}
    with pytest.raises(DataError, match="The roles are 'bot'; the turns to learn have the role 'assistant'") as caught:
        learned([row], tokenizer)
    assert "max_length" not in str(caught.value)


def test_the_input_of_alpaca_is_joined() -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        {"instruction": "Translate.", "input": given, "output": "Le chien."} for given in ("The dog.", "", None, "A fox.")
    ]
    options = {"prompt": "instruction", "completion": "output"}
    texts = [text_of(row, tokenizer, **options).partition("user\n")[2].partition("<|im_end|>")[0] for row in rows]
    assert texts == ["Translate.\n\nThe dog.", "Translate.", "Translate.", "Translate.\n\nA fox."]
    (asked,) = encode_prompts(rows[:1], tokenizer, **options)
    assert "Translate.\n\nThe dog." in tokenizer.decode(asked)
    assert list(questions(Dataset.from_list(rows), ("instruction",))) == [
        "translate. the dog.", "translate.", "translate.", "translate. a fox."
    ]  # fmt: skip
    _, report = format_dataset(Dataset.from_list(rows), tokenizer, **options)
    assert report.unread == ()
    with pytest.raises(DataError, match="--set data.prompt=instruction --set data.completion=output"):
        learned(rows, tokenizer)


def test_what_is_not_read_is_named() -> None:
    rows = [{"prompt": "a", "completion": "b", "id": 1, "system": "be brief"}]
    _, report = format_dataset(Dataset.from_list(rows), tiny_tokenizer())
    assert report.unread == ("id", "system")
    chat = [{**USER, "name": "Ann"}, {"role": "assistant", "content": "4", "train": False, "weight": 1}]
    _, report = format_dataset(Dataset.from_list([{"messages": chat, "source": "x"}]), tiny_tokenizer())
    assert report.unread == ("source", "messages[].train")


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_tables_of_other_separators_are_read(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'prompt{mark}completion\n"a{mark} b"{mark}c\n')
    assert read_file(path).to_list() == [{"prompt": f"a{mark} b", "completion": "c"}]
    path.write_text('"prompt; and more",completion\na,b\n')
    assert read_file(path).column_names == ["prompt; and more", "completion"]


def test_a_text_that_brings_its_begin_token_has_it_once() -> None:
    from tests.unit.data.test_format import with_bos

    tokenizer = with_bos()
    for row in ({"text": f"{BOS}a fox"}, {"text": "a fox"}):
        assert text_of(row, tokenizer).count(BOS) == 1
    (asked,) = encode_prompts([{"prompt": f"{BOS}a"}], tokenizer)
    assert tokenizer.decode(asked) == f"{BOS}a"


def test_a_conversation_that_begins_with_an_answer() -> None:
    unlike = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant:'")
    hello = {"role": "assistant", "content": "hello"}
    answer = {"role": "assistant", "content": "4"}
    assert learned([{"messages": [hello, USER, answer]}], tiny_tokenizer()) == [f"hello{EOS}4{EOS}"]
    assert learned([{"messages": [hello, USER, answer]}], tiny_tokenizer(RICH)) == [f"4{EOS}", f"hello{EOS}"]
    assert learned([{"messages": [{**hello, "weight": 0}, USER, answer]}], tiny_tokenizer(RICH)) == [f"4{EOS}"]
    with pytest.raises(DataError, match="begins with the assistant's turn.*weight of 0"):
        learned([{"messages": [hello, USER, answer]}], tiny_tokenizer(unlike))
    with pytest.raises(DataError, match="prompts for an answer differently than it renders one"):
        learned([{"messages": [USER, answer]}], tiny_tokenizer(unlike))


def test_an_answer_that_says_nothing_is_not_learned() -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": content}]} for content in ("4", "", None)]
    _, report = format_dataset(Dataset.from_list(rows), tiny_tokenizer())
    assert (report.examples, report.unanswered) == (1, 2)
