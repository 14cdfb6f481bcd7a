"""Any training arguments as those of small-batch training: `small_batch(trl.DPOConfig)`, and on the spot for a trainer."""

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

# Set by TrainingArguments too, to other defaults.
SHARED = tuple(
    one.name for one in fields(SmallBatchArguments) if one.name in {other.name for other in fields(TrainingArguments)}
)
# Fields of trainers that compare the completions of a batch (GRPO, RLOO, KTO): they refuse one of a single example.
_GROUPED = ("num_generations", "desirable_weight")
_BATCH = "per_device_train_batch_size"


def small_batch(arguments_class: type[TrainingArguments]) -> type[Any]:
    """A class of training arguments for small-batch training, made from a trainer's own.

    Fields that `SmallBatchArguments` also has take its defaults; all others keep their own. So does the batch size of trainers
    that compare the examples of a batch (GRPO, RLOO, KTO): they refuse a batch of one. A second call returns the same class.
    Instances can be pickled, as a checkpoint's training_args.bin requires.

    Args:
        arguments_class: `TrainingArguments` or a subclass, such as `trl.DPOConfig`.

    Raises:
        ArgumentError: if it is neither.

    Examples:
        >>> DPOArguments = sbft.small_batch(trl.DPOConfig)
        >>> args = DPOArguments(output_dir="out", beta=0.2, second_moment_half_life=50_000)
    """
    if not (isinstance(arguments_class, type) and issubclass(arguments_class, TrainingArguments)):
        raise ArgumentError(f"small_batch takes TrainingArguments or a subclass of it, and got {arguments_class!r}.")
    if issubclass(arguments_class, SmallBatchArguments):
        return arguments_class
    if arguments_class is TrainingArguments:
        return SmallBatchTrainingArguments
    hashable: Any = arguments_class  # its instances are not, and mypy takes them for it
    return _made_of(hashable)


@functools.cache
def _made_of(arguments_class: Any) -> type[Any]:
    def reduce(self: Any, protocol: Any) -> Any:
        """By the class it was made of, since the class itself has no name in a module; one derived from it has."""
        if type(self) is made:
            return _empty, (arguments_class,), vars(self)
        return object.__reduce_ex__(self, protocol)

    theirs = {one.name: one for one in fields(arguments_class)}
    kept = [(_BATCH, int, field(default=theirs[_BATCH].default))] if theirs.keys() & set(_GROUPED) else []
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
    """Arguments of small-batch training made of others, with one line that says what changed.

    What differs from its class's defaults stays: it was set by someone. What does not is as in `SmallBatchArguments`.

    Raises:
        ArgumentError: if something that was set cannot be done.
    """
    own = type(arguments)
    made = _empty(own)
    vars(made).update({one.name: one.default for one in fields(SmallBatchArguments) if one.name not in SHARED})
    vars(made).update(vars(arguments))
    changes = {
        name: (value, small)
        for name, value, small in _shared_defaults(arguments)
        if value != small and not (name == _BATCH and any(one in vars(arguments) for one in _GROUPED))
    }
    for name, (_, small) in changes.items():
        setattr(made, name, small)
    if "bf16" in changes:  # derived from it as arguments are made
        made.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    made.dataloader_pin_memory &= torch.accelerator.is_available()
    kept = _holding(made)
    made.gradient_release = not kept
    try:
        made.check()
    except ArgumentError as error:
        raise ArgumentError(f"{error} What is sbft's is set in sbft.small_batch({own.__name__})(...).") from error
    release = "released gradients" if not kept else f"gradients that are not released, because of {' and '.join(kept)},"
    settings = ", ".join(f"{name}={_shown(small)} (was {_shown(was)})" for name, (was, small) in changes.items())
    logger.warning(
        f"args is a {own.__name__} and is taken as sbft.small_batch({own.__name__}): {made.token_optimizer} and {release} in "
        f"the place of {_shown(arguments.optim)}, weights in bfloat16"
        + (f", and where it had its defaults {settings}" if settings else "")
        + f". To set these make it so: sbft.small_batch({own.__name__})(...)."
    )
    return made


def _holding(arguments: Any) -> list[str]:
    """Settings that ask for gradients that outlive their backward."""
    least = {"gradient_accumulation_steps": 1, "max_grad_norm": 0}
    return [f"{name}={getattr(arguments, name)}" for name, value in least.items() if getattr(arguments, name) > value]


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _shared_defaults(arguments: TrainingArguments) -> list[tuple[str, Any, Any]]:
    """Of fields that both have and that hold their class's default: name, value, and the default of small-batch training."""
    theirs = {one.name: one.default for one in fields(arguments)}
    ours = {one.name: one.default for one in fields(SmallBatchArguments)}
    held = [(name, getattr(arguments, name)) for name in SHARED]
    # A default of None is replaced as arguments are made: TRL's bf16.
    return [(name, value, ours[name]) for name, value in held if theirs[name] is None or value == theirs[name]]


def with_small_batch_arguments(
    trainer_class: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a trainer was called with, its arguments for training made into those of small-batch training.

    Args:
        trainer_class: the mixin and the trainer beneath it.
        args: of its `__init__`.
        kwargs: likewise.

    Raises:
        ArgumentError: if something that was set cannot be done.
    """
    place, expected = _arguments_of(trainer_class)
    given = kwargs.get("args") if len(args) <= place else args[place]
    if isinstance(given, SmallBatchArguments) and isinstance(given, expected):
        return args, kwargs
    if given is None:
        made = small_batch(expected)()
        logger.warning(f"No args were given: training as sbft.small_batch({expected.__name__})() says, into {made.output_dir}.")
    elif isinstance(given, expected):
        made = promoted(given)
    elif isinstance(given, TrainingArguments):
        made = _as(expected, given)
    else:
        raise ArgumentError(
            f"args is a {type(given).__name__}; expected a {expected.__name__}, or a sbft.small_batch({expected.__name__})."
        )
    if len(args) > place:
        return (*args[:place], made, *args[place + 1 :]), kwargs
    return args, {**kwargs, "args": made}


def _as(expected: type[TrainingArguments], given: TrainingArguments) -> Any:
    """Arguments of a more general class, as SFTTrainer takes them too: what they set, in the class that the trainer expects."""
    names = {one.name for one in fields(small_batch(expected)) if one.init}
    theirs = {one.name: one.default for one in fields(given)}
    found = {name: value for name, value in vars(given).items() if name in names and value != theirs.get(name, value)}
    # What has no default was made as the arguments were.
    said = [name for name in found if theirs[name] is not None and theirs[name] is not MISSING]
    if not isinstance(given, SmallBatchArguments):
        left = {name for name, *_ in _shared_defaults(given)}
        found = {name: value for name, value in found.items() if name not in left}
        if found.keys() & {"gradient_accumulation_steps", "max_grad_norm"}:
            found["gradient_release"] = False
            said.append("gradient_release=False, which they need,")
    made = small_batch(expected)(**found)
    logger.warning(
        f"args is a {type(given).__name__} and is taken as sbft.small_batch({expected.__name__}): what differs from its "
        f"defaults ({', '.join(said) or 'nothing'}) is kept, all else is as in sbft.small_batch({expected.__name__})()."
    )
    return made


def _arguments_of(trainer_class: type[Any]) -> tuple[int, type[TrainingArguments]]:
    """The place of `args` among a trainer's parameters, and the class that it is to be of."""
    for one in trainer_class.__mro__:
        init = vars(one).get("__init__")
        parameters = list(inspect.signature(init).parameters.values())[1:] if init is not None else []
        for place, parameter in enumerate(parameters):
            if parameter.name == "args" and parameter.kind is not parameter.VAR_POSITIONAL:
                return place, _first_class(parameter.annotation)
    return 1, TrainingArguments


def _first_class(annotation: Any) -> type[TrainingArguments]:
    """`DPOConfig` of `DPOConfig | None`."""
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    named = typing.get_args(annotation) if is_union else (annotation,)
    classes = [one for one in named if isinstance(one, type) and issubclass(one, TrainingArguments)]
    return classes[0] if classes else TrainingArguments
