"""Everything that is wrong with a recipe, found in one go: unknown keys, wrong types, contradictions."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.util
import math
import types
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sbft.methods import METHODS
from sbft.recipe.defaults import EXCLUSIVE, complete
from sbft.recipe.draft import Draft, Key
from sbft.recipe.schema import DataConfig, EvaluationConfig, LoraConfig, OptimizerConfig, Recipe

SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "evaluation": EvaluationConfig,
}

ELSEWHERE = {
    "output_dir": "write output_dir at the top of the recipe",
    "optim": "the method decides the optimizer; write `method:` at the top of the recipe",
    "optim_args": "write the settings under `optimizer:`",
    "adam_beta1": "write optimizer.beta1",
    "adam_beta2": "write optimizer.beta2",
    "adam_epsilon": "write optimizer.eps",
    "weight_decay": "write optimizer.weight_decay",
    "bf16": "write dtype at the top of the recipe",
    "fp16": "float16 overflows above 65504 and needs a loss scaler, which gradient release cannot use; write "
    "dtype: bfloat16 at the top of the recipe",
    "per_device_eval_batch_size": "write evaluation.batch_size",
    "eval_strategy": "sbft evaluates before and after training; write `evaluation:`",
    "resume_from_checkpoint": "type `sbft train RECIPE --resume`",
    "push_to_hub": "train first, then type `hf upload`",
    "do_train": "sbft train always trains",
    "do_eval": "write `evaluation:`",
    "do_predict": "write `evaluation:`",
}
"""Names of TrainingArguments that a recipe says in another place, and where."""

REPORTERS = ("tensorboard", "trackio", "wandb")
"""Where losses can be sent, each a package of its own."""

LOWER_BOUNDS = {
    "learning_rate": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0.0,
    "warmup_steps": 0.0,
    "max_grad_norm": 0.0,
    "seed": 0,
}


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
        for detail in error.errors():
            # Locations inside a list or a union carry indices and type names, which are no keys.
            key = tuple(str(part) for part in detail["loc"])[:2]
            if key not in bad_keys:
                add(key, _schema_problem(key, detail))
    training = content.get("training")
    for name, value in (training if isinstance(training, dict) else {}).items():
        if text := _training_problem(str(name), value):
            add(("training", str(name)), text)
    method = content.get("method", "sbft")
    if isinstance(method, str) and method not in METHODS:
        add(("method",), f"is {method!r}, expected one of {', '.join(METHODS)}{_nearest(method, METHODS)}.")
    clean = _without(content, bad_keys)
    for key, text in _said_twice(clean):
        add(key, text)
    if ("method",) not in bad_keys:
        for key, text in _contradictions(clean, method):
            add(key, text)
    return problems


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


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return f"; the nearest is {near[0]}" if near else ""


def _training_types() -> dict[str, Any]:
    """Names of TrainingArguments and their types. Imports transformers, hence torch: seconds."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def _schema_problem(key: Key, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key)
    if detail["type"] == "missing":
        return "is missing: " + {
            ("model",): "write which model to train, such as `model: builtin:smollm2-135m`, or type --model M.",
            ("data",): "write what to train on, such as `data: {train: my.jsonl}`, or type --data D.",
            ("data", "train"): "write what to train on, such as `train: my.jsonl`, or type --data D.",
        }.get(key, "it has no default.")
    found = repr(detail["input"])
    if key == ("dtype",) and "float16" in found and "bfloat16" not in found:
        return (
            "is float16, expected bfloat16 or float32: float16 overflows above 65504, and the loss scaler it needs "
            "cannot work with gradients that are released during the backward pass. Write dtype: bfloat16."
        )
    expected = detail["msg"].removeprefix("Input should be ").replace("Value error, ", "")
    return f"is {found}, expected {expected}."


def _unknown_key(key: Key) -> str:
    *path, name = key
    fields = SECTIONS[path[0]].model_fields if path else Recipe.model_fields
    homes = [section for section, model in SECTIONS.items() if name in model.model_fields]
    if name in Recipe.model_fields:
        return "is no key of this section; it stands at the top of the recipe."
    if homes:
        return f"is no key here; write {homes[0]}.{name}."
    if nearest := _nearest(name, fields):
        return f"is no key of a recipe{nearest}."
    if name in _training_types():
        return f"is no key here; write training.{name}."
    return f"is no key of a recipe; expected one of {', '.join(fields)}."


def _training_problem(name: str, value: Any) -> str | None:
    if name in ELSEWHERE:
        return f"cannot be set here: {ELSEWHERE[name]}."
    known = _training_types()
    if name not in known:
        homes = [section for section, model in SECTIONS.items() if name in model.model_fields]
        if homes or name in Recipe.model_fields:
            return f"is no name of TrainingArguments; write {'.'.join([*homes[:1], name])}."
        return f"is no name of TrainingArguments{_nearest(name, set(known) - set(ELSEWHERE))}."
    expected = _mismatch(known[name], value)
    if expected:
        return f"is {value!r}, expected {expected}."
    lowest = LOWER_BOUNDS.get(name)
    if lowest is not None and not (math.isfinite(float(value)) and float(value) >= lowest):
        return f"is {value!r}, expected a finite number of at least {lowest:g}."
    return None


def _mismatch(hint: Any, value: Any) -> str | None:
    """What a value of this type would look like, if `value` is none."""
    members = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
    choices = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if choices and value is not None and not isinstance(value, list):
        # Written as "enum or str" there: any string would pass, and fail late.
        values = [str(choice.value) for choice in choices[0]]
        return None if str(value) in values else f"one of {', '.join(values)}{_nearest(str(value), values)}"
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        reasons = dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in error.errors())
        return " or ".join(reasons)
    return None


def _said_twice(content: dict[str, Any]) -> typing.Iterator[tuple[Key, str]]:
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


def _contradictions(content: dict[str, Any], name: str) -> typing.Iterator[tuple[Key, str]]:
    method = METHODS[name]
    if method.package and importlib.util.find_spec(method.package) is None:
        yield (
            ("method",),
            f"is {name}, which needs the package {method.package}. Type: pip install 'sbft[{method.extra}]'",
        )
    reports = content.get("training", {}).get("report_to") or []
    for package in [reports] if isinstance(reports, str) else reports:
        if package in REPORTERS and importlib.util.find_spec(package) is None:
            yield ("training", "report_to"), f"is {package}, which is not installed. Type: pip install {package}"
    for key, value in content.get("optimizer", {}).items():
        if value is not None and key not in method.settings:
            users = [other for other in METHODS if key in METHODS[other].settings]
            yield (
                ("optimizer", key),
                f"means nothing to the optimizer of method {name}. Leave it out, or take a method that has it: "
                f"{', '.join(users)}.",
            )
    if content.get("lora") is not None and method.lora_defaults is None:
        yield ("lora",), f"is given, but method {name} trains all weights. Leave it out, or write method: lora."
    if isinstance(content.get("data", {}).get("train"), str):
        yield from _release_contradictions(complete(content), name)


def _release_contradictions(whole: dict[str, Any], name: str) -> typing.Iterator[tuple[Key, str]]:
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
