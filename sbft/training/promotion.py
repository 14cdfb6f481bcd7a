"""Makes arguments of small-batch training from any others: the class `small_batch(trl.DPOConfig)`, or plain instances."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import types
import typing
from dataclasses import MISSING, field, fields, make_dataclass
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from sbft.training.arguments import ArgumentError, SmallBatchArguments, SmallBatchTrainingArguments

logger = logging.getLogger(__name__)

# Names that TrainingArguments has too, with other defaults.
_NAMES_OF_TRANSFORMERS = {entry.name for entry in fields(TrainingArguments)}
SHARED = tuple(entry.name for entry in fields(SmallBatchArguments) if entry.name in _NAMES_OF_TRANSFORMERS)
# Fields of trainers that compare the completions of a batch (GRPO, RLOO, KTO). They refuse a batch of one example.
_GROUPED = ("num_generations", "desirable_weight")
_BATCH = "per_device_train_batch_size"


def small_batch(arguments_class: type[TrainingArguments]) -> type[Any]:
    """A class of training arguments for small-batch training, made from a trainer's own.

    Fields that `SmallBatchArguments` also has get its defaults, and all others keep their own. Trainers that compare the
    examples of a batch (GRPO, RLOO, KTO) refuse a batch of one and keep their batch size. A second call returns the same class.
    Instances can be pickled, as a checkpoint's training_args.bin requires.

    Args:
        arguments_class: `TrainingArguments` or a subclass, such as `trl.DPOConfig`.

    Raises:
        ArgumentError: if `arguments_class` is neither.

    Examples:
        >>> DPOArguments = sbft.small_batch(trl.DPOConfig)
        >>> args = DPOArguments(output_dir="out", beta=0.2, second_moment_half_life=50_000)
    """
    if not (isinstance(arguments_class, type) and issubclass(arguments_class, TrainingArguments)):
        raise ArgumentError(f"small_batch takes TrainingArguments or a subclass, but got {arguments_class!r}.")
    if issubclass(arguments_class, SmallBatchArguments):
        return arguments_class
    if arguments_class is TrainingArguments:
        return SmallBatchTrainingArguments
    hashable: Any = arguments_class  # mypy thinks that it is not, because its instances are not
    return _small_batch_class(hashable)


@functools.cache
def _small_batch_class(arguments_class: Any) -> type[Any]:
    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle by the class it was made from, since `made` has no name in a module. Classes derived from it have one."""
        if type(self) is made:
            return _empty, (arguments_class,), vars(self)
        return object.__reduce_ex__(self, protocol)

    own = {entry.name: entry for entry in fields(arguments_class)}
    kept = [(_BATCH, int, field(default=own[_BATCH].default))] if own.keys() & set(_GROUPED) else []
    made = make_dataclass(
        f"SmallBatch{arguments_class.__name__}",
        kept,
        bases=(SmallBatchArguments, arguments_class),
        namespace={"__reduce_ex__": reduce, "__doc__": f"`{arguments_class.__name__}` for small-batch training."},
        repr=False,
    )
    made.__module__ = __name__
    return made


def _empty(arguments_class: type[TrainingArguments]) -> Any:
    return object.__new__(small_batch(arguments_class))


def promoted(arguments: TrainingArguments) -> Any:
    """Arguments of small-batch training made from others; a warning says what changed.

    Values that differ from their class's defaults were set by the user and stay. The others become those of
    `SmallBatchArguments`.

    Raises:
        ArgumentError: if a value that was set is not possible.
    """
    own = type(arguments)
    made = _empty(own)
    vars(made).update({entry.name: entry.default for entry in fields(SmallBatchArguments) if entry.name not in SHARED})
    vars(made).update(vars(arguments))
    changes = {
        name: (value, small)
        for name, value, small in _shared_defaults(arguments)
        if value != small and not (name == _BATCH and any(name in vars(arguments) for name in _GROUPED))
    }
    for name, (_, small) in changes.items():
        setattr(made, name, small)
    if "bf16" in changes:  # TrainingArguments derives it from bf16
        made.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    made.dataloader_pin_memory &= torch.accelerator.is_available()
    kept = _needing_gradients(made)
    made.gradient_release = not kept
    try:
        made.check()
    except ArgumentError as error:
        raise ArgumentError(f"{error} Settings of sbft are set in sbft.small_batch({own.__name__})(...).") from error
    release = "released gradients" if not kept else f"gradients that are not released, because of {' and '.join(kept)},"
    settings = ", ".join(f"{name}={_shown(small)} (was {_shown(was)})" for name, (was, small) in changes.items())
    logger.warning(
        f"args is a {own.__name__} and is converted to sbft.small_batch({own.__name__}): {made.token_optimizer} and {release} "
        f"instead of {_shown(arguments.optim)}, weights in bfloat16"
        + (f", and instead of its defaults {settings}" if settings else "")
        + f". To choose these yourself, make args with sbft.small_batch({own.__name__})(...)."
    )
    return made


def _needing_gradients(arguments: Any) -> list[str]:
    """Settings that need gradients after backward."""
    off = {"gradient_accumulation_steps": 1, "max_grad_norm": 0}
    return [f"{name}={getattr(arguments, name)}" for name, value in off.items() if getattr(arguments, name) > value]


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _shared_defaults(arguments: TrainingArguments) -> list[tuple[str, Any, Any]]:
    """Name, value and small-batch default of the shared fields that hold their class's default."""
    defaults = {entry.name: entry.default for entry in fields(arguments)}
    small_batch_defaults = {entry.name: entry.default for entry in fields(SmallBatchArguments)}
    values = [(name, getattr(arguments, name)) for name in SHARED]
    # A default of None, such as TRL's bf16, is replaced when arguments are made.
    return [
        (name, value, small_batch_defaults[name])
        for name, value in values
        if defaults[name] is None or value == defaults[name]
    ]


def with_small_batch_arguments(
    trainer_class: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a trainer was called with, with its training arguments converted to those of small-batch training.

    Args:
        trainer_class: made of the mixin and a trainer.
        args: of its `__init__`.
        kwargs: of its `__init__`.

    Raises:
        ArgumentError: if a value that was set is not possible.
    """
    position, expected = _arguments_of(trainer_class)
    arguments = kwargs.get("args") if len(args) <= position else args[position]
    if isinstance(arguments, SmallBatchArguments) and isinstance(arguments, expected):
        return args, kwargs
    if arguments is None:
        made = small_batch(expected)()
        logger.warning(
            f"No args were passed: training with sbft.small_batch({expected.__name__})(), to the folder {made.output_dir}."
        )
    elif isinstance(arguments, expected):
        made = promoted(arguments)
    elif isinstance(arguments, TrainingArguments):
        made = _converted(arguments, expected)
    else:
        raise ArgumentError(
            f"args is a {type(arguments).__name__}; expected a {expected.__name__}, or a "
            f"sbft.small_batch({expected.__name__})."
        )
    if len(args) > position:
        return (*args[:position], made, *args[position + 1 :]), kwargs
    return args, {**kwargs, "args": made}


def _converted(arguments: TrainingArguments, expected: type[TrainingArguments]) -> Any:
    """Arguments of a more general class, which SFTTrainer also takes: the values that they set, in the expected class."""
    names = {entry.name for entry in fields(small_batch(expected)) if entry.init}
    defaults = {entry.name: entry.default for entry in fields(arguments)}
    kept = {
        name: value for name, value in vars(arguments).items() if name in names and value != defaults.get(name, value)
    }
    # Fields without a default were computed when the arguments were made.
    described = [name for name in kept if defaults[name] is not None and defaults[name] is not MISSING]
    if not isinstance(arguments, SmallBatchArguments):
        at_default = {name for name, *_ in _shared_defaults(arguments)}
        kept = {name: value for name, value in kept.items() if name not in at_default}
        if kept.keys() & {"gradient_accumulation_steps", "max_grad_norm"}:
            kept["gradient_release"] = False
            described.append("gradient_release=False, which they need,")
    made = small_batch(expected)(**kept)
    logger.warning(
        f"args is a {type(arguments).__name__} and is converted to sbft.small_batch({expected.__name__}): values that differ "
        f"from its defaults ({', '.join(described) or 'none'}) are kept, all others are those of "
        f"sbft.small_batch({expected.__name__})()."
    )
    return made


def _arguments_of(trainer_class: type[Any]) -> tuple[int, type[TrainingArguments]]:
    """The position of `args` among a trainer's parameters, and the class that its annotation names."""
    for base in trainer_class.__mro__:
        init = vars(base).get("__init__")
        parameters = list(inspect.signature(init).parameters.values())[1:] if init is not None else []
        for position, parameter in enumerate(parameters):
            if parameter.name == "args" and parameter.kind is not parameter.VAR_POSITIONAL:
                return position, _first_class(parameter.annotation)
    return 1, TrainingArguments


def _first_class(annotation: Any) -> type[TrainingArguments]:
    """The class of training arguments in an annotation, such as `DPOConfig` in `DPOConfig | None`."""
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    members = typing.get_args(annotation) if is_union else (annotation,)
    classes = [member for member in members if isinstance(member, type) and issubclass(member, TrainingArguments)]
    return classes[0] if classes else TrainingArguments
