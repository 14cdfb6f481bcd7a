"""What makes a recipe one of pretraining, and what such a recipe starts from."""

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
"""Defaults of `sbft pretrain`: those of arXiv 2507.07101, section 4; 20 tokens a parameter are Chinchilla's."""

_SCRATCH = "scratch:"
_BUILTIN = "builtin:"
_BUDGET = ("train_tokens", "tokens_per_parameter")
_MANIFEST = "tokens.json"  # of sbft.data.token_files, which a recipe that is only read does not import
_OF_QUESTIONS: dict[str, tuple[str, ...]] = {
    "data": (
        "eval", "eval_size", "train_size", "validation_size", "options", "prompt", "completion", "messages", "packing",
        "system", "label_names", "allow_overlap",
    ),
    "evaluation": ("metrics", "metric_options", "labels"),
}  # fmt: skip
"""Keys that mean nothing where every token is learned."""
_FRESH = "model: scratch:1m"
_NO_QUESTIONS = (
    "means nothing where every token of a text is learned, as this recipe asks for. Leave it out; or, to train on questions "
    "and answers, name a checkpoint under model, and no tokenizer, data.train_tokens or data.tokens_per_parameter."
)

Key = tuple[str, ...]


def is_pretraining(content: dict[str, Any]) -> bool:
    """Whether a recipe, as nested dicts, trains on every token of a corpus: from scratch, or on with a checkpoint."""
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
    """A recipe with the defaults of pretraining where it says nothing."""
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
        given = {key: value for key, value in (whole.get(section) or {}).items() if value is not None}
        whole[section] = {**values, **given}
    return whole


def has_budget(content: dict[str, Any]) -> bool:
    """Whether a recipe says in tokens how long to train."""
    return any((content.get("data") or {}).get(key) is not None for key in _BUDGET)


def problems_of_pretraining(content: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> Iterator[tuple[Key, str]]:
    """Key and sentence for each thing in a recipe that does not go with pretraining.

    Args:
        content: of the recipe.
        defaults: by section, the values of the keys that say nothing.
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
            "and data.train_tokens are both given, and say the same thing in two ways. Keep one.",
        )
    if has_budget(content) and (content.get("training") or {}).get("num_train_epochs") is not None:
        yield (
            ("training", "num_train_epochs"),
            "is given beside a budget of tokens (data.train_tokens, data.tokens_per_parameter), and both say how long to "
            "train. Keep one.",
        )


def _problems_of_fresh(content: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    whole = [name for name in METHODS if METHODS[name].lora_defaults is None]
    if content.get("method", "sbft") not in whole:
        yield (
            ("method",),
            f"trains an adapter, for which a fresh model is no base. Take one that trains all weights: {', '.join(whole)}.",
        )
    if content.get("distributed") is not None:
        yield (
            ("distributed",),
            "shards a checkpoint, and a fresh model has none. Leave it out: with optimizer.gradient_release: false, several "
            "processes replicate the model.",
        )


def _is_scratch(content: dict[str, Any]) -> bool:
    model = content.get("model")
    return isinstance(model, str) and model.startswith(_SCRATCH)


def _length(training: dict[str, Any]) -> Any:
    """What says in `training` how long to train, if anything does."""
    steps = training.get("max_steps")
    return steps if steps not in (None, -1) else training.get("num_train_epochs")
