"""Everything that is wrong with a recipe, found in one go: unknown keys, wrong types, contradictions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from sbft import metrics
from sbft.errors import holds_secret, how_to_install
from sbft.recipe.defaults import EXCLUSIVE, complete
from sbft.recipe.draft import Draft, Key
from sbft.recipe.methods import METHODS, OF_WHOLE_MATRICES, Method
from sbft.recipe.pretraining import problems_of_pretraining
from sbft.recipe.schema import (
    BatchScheduleConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    Recipe,
)
from sbft.recipe.training_keys import RANGES, REPORTERS, reporters, training_problem, training_types
from sbft.recipe.wording import closest, nearest, shown

SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "distributed": DistributedConfig,
    "batch_schedule": BatchScheduleConfig,
    "evaluation": EvaluationConfig,
}

_EXAMPLES = {
    "data": "train: my.jsonl",
    "optimizer": "weight_decay: 0.1",
    "training": "learning_rate: 1.0e-4",
    "lora": "rank: 16",
    "distributed": "fsdp_size: 2",
    "batch_schedule": "doubling_examples: 1000, largest: 16",
    "evaluation": "metrics: [exact_match]",
}
"""One key and value of each section, to show how it is written."""

_DEFAULTS = {
    section: {
        name: field.get_default(call_default_factory=True) for name, field in SECTIONS[section].model_fields.items()
    }
    for section in ("data", "evaluation")
}
_OF_LABELS = "label_accuracy"
_LARGEST, _SMALLEST = 2**63 - 1, -(2**63)
_QUOTE = "quote words such as 'yes' and 'no', which YAML takes for true and false"
_EXPECTED: dict[Key, str] = {
    ("freeze",): "a list of patterns of parameter names, such as [embeddings] or ['model.layers.0.*']",
    ("data", "label_names"): f"a word for each value of the column, such as {{0: negative, 1: positive}}; {_QUOTE}",
    ("model",): "a hub id, a folder, builtin:NAME, or scratch:SIZE",
    ("tokenizer",): "the name or folder of a tokenizer, or bpe:2048",
    ("data", "train"): "a file, a hub id, or generated:NAME",
    ("data", "validation"): "a file, a hub id, or generated:NAME",
    ("data", "eval"): "a file, a hub id, or generated:NAME",
    ("evaluation", "labels"): f"auto, or a list of two or more different words such as [good, bad]; {_QUOTE}",
}
"""What keys are like whose type alone says too little."""


def find_problems(draft: Draft) -> list[str]:
    """One sentence for each thing that is wrong: where it stands, the key, what was expected."""
    problems = list(draft.problems)
    bad_keys: set[Key] = set()

    def add(key: Key, text: str) -> None:
        bad_keys.add(key)
        problems.append(f"{draft.origin(key)}: {'.'.join(key)} {text}")

    content = draft.content
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        details = [(_key(detail["loc"]), detail) for detail in error.errors()]
        misspelt = {_meant(key) for key, detail in details if detail["type"] == "extra_forbidden"}
        for key, detail in details:
            if key not in bad_keys and not (detail["type"] == "missing" and key in misspelt):
                add(key, _schema_problem(key, detail))
    for key, value, told in _unusable(_without(content, bad_keys), ()):
        in_range = isinstance(value, float) and key[:1] == ("training",) and key[-1] in RANGES  # which says more below
        if key not in bad_keys and not in_range:
            add(key, f"holds {shown(value)}, {told}")
    training = content.get("training")
    homes = {name: name for name in Recipe.model_fields} | {
        name: f"{section}.{name}" for section, model in reversed(SECTIONS.items()) for name in model.model_fields
    }
    for name, value in (training if isinstance(training, dict) else {}).items():
        if ("training", str(name)) not in bad_keys and (text := training_problem(str(name), value, homes)):
            add(("training", str(name)), text)
    method = content.get("method", "sbft")
    if ("method",) not in bad_keys and isinstance(method, str) and method not in METHODS:
        add(("method",), f"is {shown(method)}, expected one of {', '.join(METHODS)}{nearest(method, METHODS)}.")
    clean = _without(content, bad_keys)
    measured = [*metrics.available(), _OF_LABELS, "loss", "perplexity"]
    for name in clean.get("evaluation", {}).get("metrics", []):
        if name not in measured:
            add(
                ("evaluation", "metrics"),
                f"names {shown(name)}, expected some of {', '.join(measured)}{nearest(name, measured)}.",
            )
    if _OF_LABELS in clean.get("evaluation", {}).get("metrics", []) and not clean["evaluation"].get("labels"):
        add(
            ("evaluation", "metrics"),
            f"names {_OF_LABELS}, which needs labels to choose from. Write evaluation.labels: auto, or list them there.",
        )
    for key, text in _said_twice(clean):
        add(key, text)
    if ("method",) not in bad_keys:
        for key, text in _contradictions(clean, method):
            add(key, text)
    return problems


def _unusable(value: Any, key: Key) -> Iterator[tuple[Key, Any, str]]:
    """Values anywhere in a recipe that no file can be named by, no text can hold, or no computer counts with."""
    if isinstance(value, dict):
        for name, inner in value.items():
            deeper = (*key, str(name)) if len(key) < 2 else key
            yield from _unusable(str(name), deeper)
            yield from _unusable(inner, deeper)
    elif isinstance(value, list):
        for inner in value:
            yield from _unusable(inner, key)
    elif isinstance(value, str) and any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        yield key, value, "in which a character is none: NUL, or half of one. Take it out."
    elif isinstance(value, str) and holds_secret(value):
        yield (
            key,
            value,
            "a password or a token, which the run's record and model card would show. Take it out: type `hf auth login`, or "
            "set an environment variable such as HF_TOKEN.",
        )
    elif isinstance(value, bytes):
        yield key, value, "expected text in the place of bytes."
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value, "expected a finite number."
    elif isinstance(value, int) and not _SMALLEST <= value <= _LARGEST:
        yield key, value, f"expected a number of at most {_LARGEST:,}."


def _without(content: dict[str, Any], bad: set[Key]) -> dict[str, Any]:
    """The content with all keys left out that are already reported, and sections that are none."""
    clean: dict[str, Any] = {}
    for name, value in content.items():
        if (name,) in bad or (value is None and name in {*SECTIONS, "training"}):
            continue
        if isinstance(value, dict):
            value = {key: inner for key, inner in value.items() if (name, str(key)) not in bad}
        clean[name] = value
    return clean


def _key(location: tuple[int | str, ...]) -> Key:
    # Locations inside a list or a union carry indices and type names, which are no keys.
    return tuple(str(part) for part in location)[: 2 if location[0] in SECTIONS else 1]


def _meant(key: Key) -> Key:
    """The key that a misspelt one most likely stands for."""
    *path, name = key
    fields = SECTIONS[path[0]].model_fields if path else Recipe.model_fields
    return (*path, closest(name, fields) or name)


def _schema_problem(key: Key, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key)
    if detail["type"] == "invalid_key":
        return "is no word, expected keys that are: put it in quotation marks, or take it out."
    if detail["type"] == "missing":
        return "is missing: " + {
            ("model",): "write which model to train, such as `model: builtin:smollm2-135m`, or type --model M.",
            ("data",): "write what to train on, such as `data: {train: my.jsonl}`, or type --data D.",
            ("data", "train"): "write what to train on, such as `train: my.jsonl`, or type --data D.",
        }.get(key, "it has no default.")
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
    fields = SECTIONS[path[0]].model_fields if path else Recipe.model_fields
    homes = [section for section, model in SECTIONS.items() if name in model.model_fields]
    if name in Recipe.model_fields:
        return "is no key of this section; it stands at the top of the recipe."
    if homes:
        return f"is not a key here; write {homes[0]}.{name}."
    if near := nearest(name, fields):
        return f"is no key of a recipe{near}."
    if name in training_types():
        return f"is not a key here; write training.{name}."
    return f"is no key of a recipe; expected one of {', '.join(fields)}."


def _said_twice(content: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    for section, one, other in EXCLUSIVE:
        given = content.get(section, {})
        if given.get(one) is not None and given.get(other) is not None and given.get(one) != -1:
            yield (section, other), f"and {section}.{one} are both given, and say the same thing in two ways. Keep one."
    optimizer = content.get("optimizer", {})
    if optimizer.get("schedule") == "power" and optimizer.get("second_moment_half_life") is not None:
        yield (
            ("optimizer", "second_moment_half_life"),
            "is given, but optimizer.schedule power has none. Leave it out, or write schedule: half_life.",
        )


def _contradictions(content: dict[str, Any], name: str) -> Iterator[tuple[Key, str]]:
    method = METHODS[name]
    for missing in method.missing_packages:
        yield (
            ("method",),
            f"is {name}, which needs the package {missing}. " + how_to_install(f"'sbft[{method.packages[missing]}]'"),
        )
    for name_of_one in reporters(content.get("training", {}).get("report_to")):
        package = REPORTERS.get(name_of_one)
        if package is not None and importlib.util.find_spec(package) is None:
            yield (
                ("training", "report_to"),
                f"is {name_of_one}, whose package is not installed. Type: pip install {package}",
            )
    for key, value in content.get("optimizer", {}).items():
        if value is not None and key not in method.settings:
            users = [other for other in METHODS if key in METHODS[other].settings]
            yield (
                ("optimizer", key),
                f"means nothing to the optimizer of method {name}. Leave it out, or take a method that has it: "
                f"{', '.join(users)}.",
            )
    if content.get("lora") is not None and method.lora_defaults is None:
        yield (
            ("lora",),
            f"is given, but method {name} trains all weights. Leave it out, or write method: lora or method: qlora.",
        )
    if method.lora_defaults is not None:
        yield from _sharding_under_an_adapter(content, name, method)
    if (schedule := content.get("batch_schedule")) is not None:
        yield from _schedule_contradictions(schedule, content, method)
    if content.get("distributed") is not None and method.optimizer in OF_WHOLE_MATRICES:
        yield (
            ("distributed",),
            f"is given, but method {name} works on whole matrices, which sharding would cut. Leave it out, or write method: "
            "sbft.",
        )
    if content.get("freeze") and method.lora_defaults is not None:
        yield (
            ("freeze",),
            f"is given, but method {name} trains an adapter, and none of the model's own weights. Leave it out, or take "
            f"a method that trains them: {', '.join(one for one in METHODS if METHODS[one].lora_defaults is None)}.",
        )
    yield from problems_of_pretraining(content, _DEFAULTS)
    if isinstance(content.get("data", {}).get("train"), str):
        whole = complete(content)
        yield from _release_contradictions(whole, name)
        yield from _unused_first_moment(whole["optimizer"])


def _sharding_under_an_adapter(content: dict[str, Any], name: str, method: Method) -> Iterator[tuple[Key, str]]:
    sizes = content.get("distributed")
    if sizes is None:
        return
    if method.quantization is not None:
        yield (
            ("distributed",),
            f"is given, but method {name} holds the model in 4 bits, which are not sharded. Leave it out: --num-processes then "
            "replicates the model; or write method: lora.",
        )
        return
    if (sizes.get("tp_size") or 1) > 1:
        yield (
            ("distributed", "tp_size"),
            f"is {sizes['tp_size']}, but method {name} trains an adapter, which lies on whole matrices. Leave it out, and "
            "write fsdp_size to shard the model under the adapter.",
        )
    if (content.get("lora") or {}).get("dora"):
        yield (
            ("lora", "dora"),
            "is true together with distributed, but DoRA goes by the norms of whole matrices. Leave one of them out.",
        )


def _schedule_contradictions(
    schedule: dict[str, Any], content: dict[str, Any], method: Method
) -> Iterator[tuple[Key, str]]:
    training = {**method.defaults()["training"], **content.get("training", {})}
    first, accumulated = int(training["per_device_train_batch_size"]), int(training["gradient_accumulation_steps"])
    if schedule.get("largest") is not None and int(schedule["largest"]) < first:
        yield (
            ("batch_schedule", "largest"),
            f"is {schedule['largest']}, less than the first batch, training.per_device_train_batch_size {first}.",
        )
    if accumulated > 1:
        yield (
            ("batch_schedule",),
            f"makes the batch larger itself, and training.gradient_accumulation_steps is {accumulated}. Write 1.",
        )
    if content.get("distributed") is not None:
        yield ("batch_schedule",), "is given with distributed, and works in one process. Leave out one of them."


def _unused_first_moment(optimizer: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    for key in ("beta1", "first_moment_half_life"):
        if optimizer.get("rest_optimizer") == "adafactor" and optimizer.get(key) is not None:
            yield (
                ("optimizer", key),
                "is given, but optimizer.rest_optimizer is adafactor, which has no first moment. Leave it out, or write "
                "rest_optimizer: adamw.",
            )


def _release_contradictions(whole: dict[str, Any], name: str) -> Iterator[tuple[Key, str]]:
    if not whole["optimizer"].get("gradient_release"):
        return
    steps, norm = whole["training"].get("gradient_accumulation_steps", 1), whole["training"].get("max_grad_norm", 0)
    off = "write optimizer.gradient_release: false, which holds all gradients at once"
    if int(steps) > 1:
        yield (
            ("training", "gradient_accumulation_steps"),
            f"is {steps}, but method {name} releases each gradient during the backward pass, so that there is nothing "
            f"to accumulate. Write 1 (small batches need no accumulation), or {off}.",
        )
    if float(norm or 0) > 0:
        yield (
            ("training", "max_grad_norm"),
            f"is {norm}, but clipping by the global norm needs all gradients at once, and method {name} releases each "
            f"during the backward pass. Write 0 (Adafactor clips each update by itself), or {off}.",
        )
