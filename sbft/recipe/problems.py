"""Finds every problem of a recipe: unknown keys, wrong types, contradictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from sbft import metrics
from sbft.errors import holds_secret
from sbft.recipe.contradictions import contradictions, given_twice
from sbft.recipe.draft import Draft, Key
from sbft.recipe.methods import METHODS
from sbft.recipe.offload import EXPECTED
from sbft.recipe.schema import INNER_SECTIONS, SECTIONS, Recipe, fields_at
from sbft.recipe.training_keys import RANGES, training_problem, training_types
from sbft.recipe.wording import closest, nearest, shown

_EXAMPLES = {
    "data": "train: my.jsonl",
    "optimizer": "weight_decay: 0.1",
    "training": "learning_rate: 1.0e-4",
    "lora": "rank: 16",
    "distributed": "fsdp_size: 2",
    "batch_schedule": "doubling_examples: 1000, largest: 16",
    "evaluation": "metrics: [exact_match]",
    "replay": "data: old.jsonl, share: 0.05",
    "watch": "english: {data: english.jsonl}",
}
"""An example of each section, to show how it is written."""

_OF_LABELS = "label_accuracy"
_LARGEST, _SMALLEST = 2**63 - 1, -(2**63)
_QUOTE = "quote words such as 'yes' and 'no', which YAML takes for true and false"
_EXPECTED: dict[Key, str] = {
    ("freeze",): "a list of patterns of parameter names, such as [embeddings] or ['model.layers.0.*']",
    ("data", "label_names"): f"a word for each value of the column, such as {{0: negative, 1: positive}}; {_QUOTE}",
    ("offload",): EXPECTED,
    ("model",): "a hub id, a folder, builtin:NAME, or scratch:SIZE",
    ("tokenizer",): "the name or folder of a tokenizer, or bpe:2048",
    ("data", "train"): "a file, a hub id, or generated:NAME",
    ("data", "validation"): "a file, a hub id, or generated:NAME",
    ("data", "eval"): "a file, a hub id, or generated:NAME",
    ("data", "replay", "share"): "a share of the tokens between 0 and 1, such as 0.05",
    ("evaluation", "labels"): f"auto, or a list of two or more different words such as [good, bad]; {_QUOTE}",
}
"""What to expect for keys whose type alone says too little."""


def find_problems(draft: Draft) -> list[str]:
    """A message for each problem: where it is, the key, what was expected."""
    problems = list(draft.problems)
    bad_keys: set[Key] = set()

    def add(found: Iterable[tuple[Key, str]]) -> None:
        for key, text in found:
            bad_keys.add(key)
            problems.append(f"{draft.origin(key)}: {'.'.join(key)} {text}")

    content = draft.content
    add(_schema_problems(content))
    add(_unusable_values(content, bad_keys))
    add(_training_problems(content.get("training"), bad_keys))
    method = content.get("method", "sbft")
    if ("method",) not in bad_keys and isinstance(method, str) and method not in METHODS:
        add([(("method",), f"is {shown(method)}, expected one of {', '.join(METHODS)}{nearest(method, METHODS)}.")])
    clean = _without(content, bad_keys)
    add(_metric_problems(clean.get("evaluation", {})))
    add(given_twice(clean))
    if ("method",) not in bad_keys:
        add(contradictions(clean, method))
    return problems


def _schema_problems(content: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """The first problem of each key that is unknown, missing or of another type."""
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        details = [(_key(detail["loc"]), detail) for detail in error.errors()]
        misspelt = {_meant(key) for key, detail in details if detail["type"] == "extra_forbidden"}
        reported: set[Key] = set()
        for key, detail in details:
            if key not in reported and not (detail["type"] == "missing" and key in misspelt):
                reported.add(key)
                yield key, _schema_problem(key, detail)


def _unusable_values(content: dict[str, Any], bad_keys: set[Key]) -> Iterator[tuple[Key, str]]:
    for key, value, reason in _unusable(_without(content, bad_keys), ()):
        # A number in the training section that has a range gets a more specific message later.
        has_range = isinstance(value, float) and key[:1] == ("training",) and key[-1] in RANGES
        if key not in bad_keys and not has_range:
            yield key, f"has {shown(value)}, {reason}"


def _training_problems(training: Any, bad_keys: set[Key]) -> Iterator[tuple[Key, str]]:
    homes = {name: name for name in Recipe.model_fields} | {
        name: f"{section}.{name}" for section, model in reversed(SECTIONS.items()) for name in model.model_fields
    }
    for name, value in (training if isinstance(training, dict) else {}).items():
        key = ("training", str(name))
        if key not in bad_keys and (text := training_problem(str(name), value, homes)):
            yield key, text


def _metric_problems(evaluation: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    measured = [*metrics.available(), _OF_LABELS, *metrics.ALWAYS, metrics.BITS_PER_BYTE]
    names = evaluation.get("metrics", [])
    yield from _unknown_metrics(("evaluation", "metrics"), names, measured)
    for name, watched in evaluation.get("watch", {}).items():
        at = ("evaluation", "watch", str(name), "metrics")
        of_watched = [metric for metric in measured if metric != _OF_LABELS]
        yield from _unknown_metrics(at, watched.get("metrics") or [], of_watched)
    if _OF_LABELS in names and not evaluation.get("labels"):
        yield (
            ("evaluation", "metrics"),
            f"names {_OF_LABELS}, which needs labels to choose from. Write evaluation.labels: auto, or list them there.",
        )


def _unknown_metrics(key: Key, names: list[str], measured: list[str]) -> Iterator[tuple[Key, str]]:
    for name in names:
        if name not in measured:
            yield key, f"names {shown(name)}, expected some of {', '.join(measured)}{nearest(name, measured)}."


def _unusable(value: Any, key: Key) -> Iterator[tuple[Key, Any, str]]:
    """Key, value and reason for each value that is wrong for any key: broken text, secrets, bytes, too large numbers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            deeper = (*key, str(name)) if len(key) < 2 else key
            yield from _unusable(str(name), deeper)
            yield from _unusable(inner, deeper)
    elif isinstance(value, list):
        for inner in value:
            yield from _unusable(inner, key)
    elif isinstance(value, str) and any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        yield key, value, "which has an invalid character: NUL, or half of a surrogate pair. Remove it."
    elif isinstance(value, str) and holds_secret(value):
        yield (
            key,
            value,
            "a password or a token, which the run's record and model card would show. Remove it: type `hf auth login`, or "
            "set an environment variable such as HF_TOKEN.",
        )
    elif isinstance(value, bytes):
        yield key, value, "expected text instead of bytes."
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value, "expected a finite number."
    elif isinstance(value, int) and not _SMALLEST <= value <= _LARGEST:
        yield key, value, f"expected a number of at most {_LARGEST:,}."


def _without(content: dict[str, Any], bad: set[Key]) -> dict[str, Any]:
    """The content without the keys that are already reported, and without empty sections."""
    clean: dict[str, Any] = {}
    for name, value in content.items():
        if (name,) in bad or (value is None and name in {*SECTIONS, "training"}):
            continue
        if isinstance(value, dict):
            # A key within a section of a section takes the whole of that one with it.
            value = {key: inner for key, inner in value.items() if (name, str(key)) not in {key[:2] for key in bad}}
        clean[name] = value
    return clean


def _key(location: tuple[int | str, ...]) -> Key:
    # Locations inside a list or a union have indices and type names in them, which are not keys.
    parts = tuple(str(part) for part in location)
    if parts[:2] in INNER_SECTIONS:
        return parts[: 3 if parts[0] == "data" else 4]
    return parts[: 2 if parts[0] in SECTIONS else 1]


def _meant(key: Key) -> Key:
    """The key that a misspelt one is closest to."""
    *path, name = key
    return (*path, closest(name, fields_at(path)) or name)


def _schema_problem(key: Key, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key)
    if detail["type"] == "invalid_key":
        return "is not text, as a key must be: put it in quotation marks, or remove it."
    if detail["type"] == "missing":
        return "is missing: " + {
            ("model",): "write which model to train, such as `model: builtin:smollm2-135m`, or type --model M.",
            ("data",): "write what to train on, such as `data: {train: my.jsonl}`, or type --data D.",
            ("data", "train"): "write what to train on, such as `train: my.jsonl`, or type --data D.",
            ("data", "replay", "data"): "write what to mix in, such as `data: old.jsonl`.",
            ("data", "replay", "share"): "write its share of all tokens, such as `share: 0.05`.",
        }.get(key, "write what to measure, such as `data: other.jsonl`." if key[-1] == "data" else "it has no default.")
    found = shown(detail["input"])
    if key in _EXPECTED:
        return f"is {found}, expected {_EXPECTED[key]}."
    if key == ("dtype",) and "float16" in found and "bfloat16" not in found:
        return (
            "is float16, expected bfloat16 or float32: float16 overflows above 65504, and the loss scaler it needs "
            "cannot work with gradients that are released during the backward pass. Write dtype: bfloat16."
        )
    if detail["type"] in {"model_type", "model_attributes_type", "dict_type"}:
        example = _EXAMPLES.get(key[-1], "key: value")
        if key == ("data",) and isinstance(detail["input"], str):
            example = f"train: {detail['input']}" if len(detail["input"]) < 100 else example
        return f"is {found}, expected keys with values; write `{key[-1]}: {{{example}}}`."
    expected = detail["msg"].removeprefix("Input should be ").partition(", unable to ")[0]
    expected = expected.replace("a valid integer", "an integer").replace("a valid ", "a ")
    number = "a number " if expected.startswith(("greater", "less")) else ""
    return f"is {found}, expected {number}{expected}."


def _unknown_key(key: Key) -> str:
    *path, name = key
    fields = fields_at(path)
    homes = [section for section, model in SECTIONS.items() if name in model.model_fields]
    if name in Recipe.model_fields:
        return "is not a key of this section; it belongs at the top of the recipe."
    if homes:
        return f"is not a key here; write {homes[0]}.{name}."
    if near := nearest(name, fields):
        return f"is not a key of a recipe{near}."
    if name in training_types():
        return f"is not a key here; write training.{name}."
    return f"is not a key of a recipe; expected one of {', '.join(fields)}."
