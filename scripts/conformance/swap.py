"""Puts sbft's classes in place of those of transformers and TRL."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import transformers

from sbft.training.arguments import SmallBatchArguments
from sbft.training.trainer import SmallBatchMixin

# The trainers of every library, each with its arguments.
TRAINERS = {
    "transformers": {"Trainer": "TrainingArguments", "Seq2SeqTrainer": "Seq2SeqTrainingArguments"},
    "trl": {
        "SFTTrainer": "SFTConfig",
        "DPOTrainer": "DPOConfig",
        "KTOTrainer": "KTOConfig",
        "RewardTrainer": "RewardConfig",
        "GRPOTrainer": "GRPOConfig",
        "RLOOTrainer": "RLOOConfig",
    },
}


def put_in_place(mode: str, library: str) -> None:
    """Replaces the trainers and arguments of `library` for all later imports from its top level.

    Args:
        mode: `default`, sbft as a user gets it; `mechanics`, sbft's trainer with the library's own optimizer and defaults.
        library: a key of `TRAINERS`.
    """
    module = __import__(library)
    for trainer_name, arguments_name in TRAINERS[library].items():
        arguments = _arguments(getattr(module, arguments_name), mode)
        trainer = _trainer(getattr(module, trainer_name), arguments)
        for place in (module, sys.modules[__name__]):  # in this module too, so that they can be pickled
            _set(place, trainer_name, trainer)
            _set(place, arguments_name, arguments)


def _set(module: ModuleType, name: str, cls: type) -> None:
    setattr(module, name, cls)


def _arguments(theirs: type, mode: str) -> type:
    """A dataclass of sbft's fields and theirs; in `mechanics`, their defaults where both have the field."""
    namespace: dict[str, Any] = {"__module__": __name__, "__doc__": theirs.__doc__, "__annotations__": {}}
    if mode == "mechanics":
        their_defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
        for field in dataclasses.fields(SmallBatchArguments):
            if field.name in their_defaults:
                namespace["__annotations__"][field.name] = field.type
                namespace[field.name] = dataclasses.field(default=their_defaults[field.name], metadata=field.metadata)
        namespace["__annotations__"]["token_optimizer"] = "str | None"
        namespace["token_optimizer"] = None
    return dataclasses.dataclass(type(theirs.__name__, (SmallBatchArguments, theirs), namespace))


def _trainer(theirs: type, arguments: type) -> type:
    namespace: dict[str, Any] = {"__module__": __name__, "__doc__": theirs.__doc__}
    trainer = type(theirs.__name__, (SmallBatchMixin, theirs), namespace)
    if theirs is transformers.Trainer:

        def __init__(self: Any, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
            args = arguments(output_dir="tmp_trainer") if args is None else args  # as theirs does
            super(trainer, self).__init__(model, args, *rest, **kwargs)

        trainer.__init__ = __init__  # type: ignore[misc]
    return trainer
