"""Recipes of pretraining: how they are recognised, their defaults and their problems."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbft.recipe.methods import METHODS
from sbft.tokens import PRETRAINING_HALF_LIFE

PRETRAINING: dict[str, dict[str, Any]] = {
    "data": {"max_length": 512, "tokens_per_parameter": 20},
    "optimizer": {"second_moment_half_life": round(PRETRAINING_HALF_LIFE)},
    "training": {"lr_scheduler_type": "cosine", "warmup_steps": 0.05},
}
"""Defaults of `sbft pretrain`: those of arXiv 2507.07101, section 4; 20 tokens per parameter are Chinchilla's."""

_SCRATCH = "scratch:"
_BUILTIN = "builtin:"
_BUDGET = ("train_tokens", "tokens_per_parameter")
_MANIFEST = "tokens.json"  # as in sbft.data.token_files, which is too slow to import for reading a recipe
_OF_QUESTIONS: dict[str, tuple[str, ...]] = {
    "data": (
        "eval", "eval_size", "train_size", "validation_size", "options", "prompt", "completion", "messages", "packing",
        "system", "label_names", "allow_overlap",
    ),
    "evaluation": ("metrics", "metric_options", "labels"),
}  # fmt: skip
"""Keys that have no effect where every token is learned."""
_FRESH = "model: scratch:1m"
_NO_QUESTIONS = (
    "has no effect here, because this recipe trains on every token of a text. Leave it out; or, to train on questions and "
    "answers, name a checkpoint under model, and no tokenizer, data.train_tokens or data.tokens_per_parameter."
)

Key = tuple[str, ...]


def is_pretraining(content: dict[str, Any]) -> bool:
    """Whether a recipe, as nested dicts, trains on every token of a corpus, from scratch or from a checkpoint."""
    data = content.get("data") or {}
    source = data.get("train")
    return (
        _is_scratch(content)
        or content.get("tokenizer") is not None
        or any(data.get(key) is not None for key in _BUDGET)
        or (
            isinstance(source, str)
            and (source.startswith(_BUILTIN) or (Path(source).expanduser() / _MANIFEST).is_file())
        )
    )


def with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """Complete a recipe with the defaults of pretraining."""
    whole = copy.deepcopy(content)
    defaults = copy.deepcopy(PRETRAINING)
    data, optimizer, training = (whole.get(section) or {} for section in ("data", "optimizer", "training"))
    if any(data.get(key) is not None for key in _BUDGET) or _length(training) is not None:
        del defaults["data"]["tokens_per_parameter"]
    settings = METHODS[whole.get("method", "sbft")].settings
    own = optimizer.get("beta2") is not None or optimizer.get("schedule") == "power"
    if own or "second_moment_half_life" not in settings:
        del defaults["optimizer"]["second_moment_half_life"]
    if training.get("warmup_ratio") is not None:
        del defaults["training"]["warmup_steps"]
    for section, values in defaults.items():
        given_values = {key: value for key, value in (whole.get(section) or {}).items() if value is not None}
        whole[section] = {**values, **given_values}
    return whole


def has_budget(content: dict[str, Any]) -> bool:
    """Whether a recipe sets the length of training in tokens."""
    return any((content.get("data") or {}).get(key) is not None for key in _BUDGET)


def problems_of_pretraining(content: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> Iterator[tuple[Key, str]]:
    """Key and message for each setting of a recipe that contradicts pretraining.

    Args:
        content: of the recipe.
        defaults: default values of keys by section; a key with its default value is no problem.
    """
    if not is_pretraining(content):
        return
    for section, keys in _OF_QUESTIONS.items():
        for key in keys:
            value = (content.get(section) or {}).get(key)
            if value is not None and value != defaults[section][key]:
                yield (section, key), _NO_QUESTIONS
    if (content.get("data") or {}).get("replay") is not None:
        yield (
            ("data", "replay"),
            "mixes examples, and this recipe trains on windows of one stream of tokens. Leave it out; or, to train on the "
            "texts as examples, leave out data.train_tokens and data.tokens_per_parameter, and write packing: true.",
        )
    if _is_scratch(content):
        yield from _problems_of_fresh(content)
    elif content.get("tokenizer") is not None:
        yield (
            ("tokenizer",),
            f"is given, but the model {content.get('model')} has its own. Leave it out, or write {_FRESH}.",
        )
    data = content.get("data") or {}
    if all(data.get(key) is not None for key in _BUDGET):
        yield (
            ("data", "tokens_per_parameter"),
            "and data.train_tokens are both given, but they set the same thing. Keep one.",
        )
    if has_budget(content) and (content.get("training") or {}).get("num_train_epochs") is not None:
        yield (
            ("training", "num_train_epochs"),
            "is given together with a budget of tokens (data.train_tokens, data.tokens_per_parameter), but both set the length "
            "of training. Keep one.",
        )


def _problems_of_fresh(content: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    whole = [name for name in METHODS if METHODS[name].lora_defaults is None]
    if content.get("method", "sbft") not in whole:
        yield (
            ("method",),
            f"trains an adapter, which is useless on a new model. Choose one that trains all weights: {', '.join(whole)}.",
        )
    if content.get("distributed") is not None:
        yield (
            ("distributed",),
            "shards a checkpoint, but a new model has none. Leave it out: with optimizer.gradient_release: false, several "
            "processes replicate the model.",
        )


def _is_scratch(content: dict[str, Any]) -> bool:
    model = content.get("model")
    return isinstance(model, str) and model.startswith(_SCRATCH)


def _length(training: dict[str, Any]) -> Any:
    """The key of `training` that sets the length of training, if any does."""
    steps = training.get("max_steps")
    return steps if steps not in (None, -1) else training.get("num_train_epochs")
