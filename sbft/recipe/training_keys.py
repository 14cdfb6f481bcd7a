"""Checks keys of a recipe's `training` section, whose names and types are those of TrainingArguments."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sbft.recipe.settings import Range, settings_in
from sbft.recipe.wording import nearest, shown

ELSEWHERE = {
    "output_dir": "write output_dir at the top of the recipe",
    "optim": "the method decides the optimizer; write `method:` at the top of the recipe",
    "optim_args": "write the settings under `optimizer:`",
    **{
        setting.transformers_argument: f"write optimizer.{name}"
        for name, setting in settings_in("optimizer").items()
        if setting.transformers_argument
    },
    "bf16": "write dtype at the top of the recipe",
    "fp16": "float16 overflows above 65504 and needs a loss scaler, which gradient release cannot use; write "
    "dtype: bfloat16 at the top of the recipe",
    "per_device_eval_batch_size": "write evaluation.batch_size",
    "resume_from_checkpoint": "type `sbft train RECIPE --resume`",
    "hub_token": "it would stand in the run's record; type `hf auth login`, or set HF_TOKEN",
    "push_to_hub_token": "it would stand in the run's record; type `hf auth login`, or set HF_TOKEN",
    "push_to_hub": "train first, then type `hf upload`",
    "do_train": "sbft train always trains",
    "do_eval": "write `evaluation:`",
    "do_predict": "write `evaluation:`",
    "disable_tqdm": "sbft draws its own progress bar, and prints lines where the output is not a terminal; leave it out",
}
"""Arguments of TrainingArguments that a recipe sets elsewhere or not at all, and what to do instead."""

REPORTERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Services that losses can be sent to, and the package that each requires."""

LARGEST_SEED = 2**32 - 1  # NumPy's generator, which transformers seeds too, takes 32 bits


# More steps than any run makes; above about 1e15, counting in floating point goes wrong.
_MOST_STEPS = 10**12
_MOST_WORKERS = 4096

RANGES = {
    **{name: setting.domain for name, setting in settings_in("training").items() if isinstance(setting.domain, Range)},
    "num_train_epochs": Range(0, 10**6, above=True),
    "max_steps": Range(1, _MOST_STEPS, off=-1),
    "warmup_steps": Range(0, _MOST_STEPS),
    "max_grad_norm": Range(0),
    "logging_steps": Range(0, _MOST_STEPS, above=True),
    "save_steps": Range(0, _MOST_STEPS, above=True),
    "save_total_limit": Range(1, _MOST_STEPS),
    "dataloader_num_workers": Range(0, _MOST_WORKERS),
    "seed": Range(0, LARGEST_SEED),
    "data_seed": Range(0, LARGEST_SEED),
}
"""The range of each key that its type does not already give."""


def training_types() -> dict[str, Any]:
    """Names of TrainingArguments and their types. This imports transformers and torch, which takes seconds."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def training_problem(name: str, value: Any, homes: dict[str, str]) -> str | None:
    """What is wrong with a key of the section, or None.

    Args:
        name: the key.
        value: what the recipe gives it.
        homes: names that belong elsewhere in the recipe, and their full names there.
    """
    if name in ELSEWHERE:
        return f"cannot be set here: {ELSEWHERE[name]}."
    known = training_types()
    if name not in known:
        if name in homes:
            return f"is not a setting of TrainingArguments; write {homes[name]}."
        return f"is not a setting of TrainingArguments{nearest(name, set(known) - set(ELSEWHERE))}."
    if name == "report_to":
        return _reporter_problem(value)
    expected = _mismatch(known[name], value)
    if expected:
        return f"is {shown(value)}, expected {expected}."
    limits = RANGES.get(name)
    if limits is not None and value is not None and not limits.holds(float(value)):
        return f"is {shown(value)}, expected {limits.expected(value)}."
    return None


def reporters(value: Any) -> list[str]:
    """The names in a value of report_to."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _reporter_problem(value: Any) -> str | None:
    names = ["none", "all", *REPORTERS]
    if not isinstance(value, str | list | None) or not all(isinstance(name, str) for name in reporters(value)):
        return f"is {shown(value)}, expected one of {', '.join(names)}, or a list of them."
    for name in reporters(value):
        if name not in names:
            return f"is {shown(name)}, expected one of {', '.join(names)}{nearest(name, names)}."
    return None


def _mismatch(hint: Any, value: Any) -> str | None:
    """What was expected, if `value` does not have this type; else None."""
    members = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
    choices = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    if choices and value is not None and not isinstance(value, list):
        # Declared as "enum or str": any string would pass here, and fail later.
        values = [str(choice.value) for choice in choices[0]]
        return None if str(value) in values else f"one of {', '.join(values)}{nearest(str(value), values)}"
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        reasons = dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in error.errors())
        return " or ".join(reasons).replace("a valid boolean", "true or false")
    return None
