"""The table of settings: everything that has a setting takes it from there, and the optimizers agree with it."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from sbft.recipe.draft import read_yaml
from sbft.recipe.methods import METHODS
from sbft.recipe.schema import BatchScheduleConfig, OptimizerConfig
from sbft.recipe.settings import (
    ARGUMENTS,
    OPTIMIZER_KEYS,
    OPTIMIZERS,
    RIVALS,
    SETTINGS,
    TRANSFORMERS_OPTIMIZERS,
    Range,
    Setting,
    settings_in,
)
from sbft.training.arguments import SmallBatchArguments, SmallBatchTrainingArguments
from sbft.training.token_optimizers import TOKEN_OPTIMIZERS


@pytest.mark.parametrize(
    ("section", "model"), [("optimizer", OptimizerConfig), ("batch_schedule", BatchScheduleConfig)]
)
def test_a_section_of_the_recipe_has_the_settings_of_the_table(section: str, model: Any) -> None:
    settings = settings_in(section)
    assert list(model.model_fields) == list(settings)
    for name, field in model.model_fields.items():
        assert field.description == settings[name].help
        assert field.is_required() == settings[name].required


def test_the_trainers_arguments_are_those_of_the_table() -> None:
    declared = {field.name: field for field in fields(SmallBatchArguments)}
    assert declared.keys() == {name for name, setting in ARGUMENTS.items() if not setting.is_transformers_own}
    hints = typing.get_type_hints(SmallBatchArguments)
    for name, field in declared.items():
        setting = ARGUMENTS[name]
        assert (field.default, field.metadata["help"]) == (setting.default, setting.help), name
        kinds = set(typing.get_args(hints[name])) or {hints[name]}
        assert setting.type in kinds and (type(None) in kinds) == (
            setting.default is None or name == "token_optimizer"
        ), name


def test_a_command_line_made_of_the_arguments_shows_the_sentences_of_the_table() -> None:
    shown = HfArgumentParser(SmallBatchTrainingArguments).format_help()  # type: ignore[arg-type]
    words = " ".join(shown.replace("-\n", "-").split())
    for name in ("cuda_graphs", "rounding_seed", "learning_rate", "schedule"):
        assert " ".join(ARGUMENTS[name].help.split()) in words, name


def test_names_of_transformers_are_names_of_transformers() -> None:
    theirs = {field.name for field in fields(TrainingArguments)}
    assert {setting.transformers_argument for setting in SETTINGS} - {""} <= theirs
    assert settings_in("training").keys() <= theirs
    assert METHODS.keys() and {method.optimizer for method in METHODS.values()} == OPTIMIZER_KEYS.keys()


def test_rivals_have_one_domain_of_optimizers() -> None:
    """An optimizer has both settings of a pair or neither, except for transformers' optimizers, which count no tokens."""
    for section, first, second in RIVALS:
        settings = settings_in(section)
        assert settings[first].token_optimizers == settings[second].token_optimizers


def test_the_trainer_trains_by_default_as_method_sbft_does() -> None:
    method = METHODS["sbft"]
    assert ARGUMENTS["token_optimizer"].default == method.optimizer
    defaults = method.defaults()
    for section in ("optimizer", "training"):
        for name, setting in settings_in(section).items():
            if setting.default is not None and name in defaults[section]:
                assert setting.default == defaults[section][name], name


# The optimizers themselves


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_settings_that_the_table_says_it_understands(name: str) -> None:
    takes = set(inspect.signature(TOKEN_OPTIMIZERS[name]).parameters) - {"params", "lr"}
    if name == "row_adafactor":
        takes -= {"min_dim_size_to_factor"}  # inherited from Adafactor; the rows of every matrix are summed
    settings = settings_in("optimizer")
    assert takes == {key for key in OPTIMIZER_KEYS[name] if settings[key].is_keyword}


def test_the_table_knows_the_optimizers_that_the_trainer_can_make() -> None:
    assert tuple(TOKEN_OPTIMIZERS) == OPTIMIZERS


def edges(setting: Setting) -> Iterator[tuple[Any, bool]]:
    """Values near the ends of a setting's domain, and whether they are in it."""
    if isinstance(setting.domain, tuple):
        yield from ((word, True) for word in setting.domain)
        yield "other", False
    elif isinstance(setting.domain, Range) and setting.name != "seed":  # for it, an optimizer accepts any integer
        numbers = [-1.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan]
        for number in numbers if setting.type is float else [-1, 0, 1, 2]:
            yield number, setting.domain.holds(number)


CASES = [
    (optimizer, name, value, in_domain)
    for optimizer in OPTIMIZERS
    for name, setting in settings_in("optimizer").items()
    if optimizer in setting.optimizers and setting.is_keyword
    for value, in_domain in edges(setting)
]


@pytest.mark.parametrize(("optimizer", "name", "value", "in_domain"), CASES)
def test_an_optimizer_takes_the_values_of_the_tables_domain_and_no_others(
    optimizer: str, name: str, value: Any, in_domain: bool
) -> None:
    given = {name: value}
    if optimizer == "sinkgd" and name in ("beta1", "first_moment_half_life"):
        given["rest_optimizer"] = "adamw"  # which has a first moment

    def make() -> None:
        TOKEN_OPTIMIZERS[optimizer]([torch.zeros(2, 2)], **given)

    if in_domain:
        make()
    else:
        with pytest.raises(ValueError, match=name):
            make()


@pytest.mark.parametrize("value", [-1e-4, math.inf, math.nan])
def test_a_rate_outside_of_its_domain_is_refused_wherever_it_comes_in(value: float, tmp_path: Path) -> None:
    domain = ARGUMENTS["learning_rate"].domain
    assert isinstance(domain, Range) and not domain.holds(value)
    with pytest.raises(ValueError, match="learning_rate is .*; expected a finite number of at least 0"):
        SmallBatchTrainingArguments(str(tmp_path), learning_rate=value)
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
        TOKEN_OPTIMIZERS["adafactor"]([torch.zeros(2, 2)], lr=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("learning_rate", "fast"),
        ("max_skipped_steps", None),
    ],
)
def test_what_no_trainer_can_train_with_is_refused_when_arguments_are_made(
    name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a finite number of at least"):
        SmallBatchTrainingArguments(str(tmp_path), **{name: value})


def test_a_rate_may_be_text_that_a_yaml_file_of_arguments_has() -> None:
    assert (
        read_yaml("1e-4") == 1e-4
        and float(SmallBatchTrainingArguments("o", learning_rate="1e-4").learning_rate) == 1e-4
    )  # type: ignore[arg-type]


# Names


@pytest.mark.parametrize(
    ("key", "optimizer", "argument"),
    [
        ("eps", "adafactor", "optimizer_eps"),
        ("eps", "torch_adamw", "adam_epsilon"),
        ("seed", "adamw", "rounding_seed"),
        ("beta2", "sinkgd", "beta2"),
        ("beta2", "bitsandbytes_adamw8bit", "adam_beta2"),
        ("weight_decay", "transformers_adafactor", "weight_decay"),
        ("weight_decay", "sgd", "weight_decay"),
    ],
)
def test_a_key_of_the_recipe_is_an_argument_of_whoever_makes_the_optimizer(
    key: str, optimizer: str, argument: str
) -> None:
    assert settings_in("optimizer")[key].argument_for(optimizer) == argument


@pytest.mark.parametrize("optimizer", TRANSFORMERS_OPTIMIZERS)
def test_transformers_has_an_argument_for_each_key_of_its_optimizers(optimizer: str) -> None:
    settings = settings_in("optimizer")
    names = {settings[key].argument_for(optimizer) for key in OPTIMIZER_KEYS[optimizer] if settings[key].is_keyword}
    assert names <= {field.name for field in fields(TrainingArguments)}


def test_names_of_methods_are_known_without_anything_heavy() -> None:
    heavy = {"torch", "transformers", "pydantic", "yaml", "numpy"}
    code = f"import sys, sbft.recipe.methods; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
