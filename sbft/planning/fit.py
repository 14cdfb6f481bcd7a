"""What fits: the predicted peak of every method beside the memory there is, and the longest sequence that would fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from sbft.errors import SbftError
from sbft.methods import METHODS
from sbft.models import load_config
from sbft.planning.predict import Prediction, predict_recipe
from sbft.recipe import Recipe, load_recipe, resolve

TIGHT = 0.95
"""A prediction over this share of the memory may be too low by as much as is left."""
_MULTIPLE = 16  # of tokens, that the collator pads to
_CLOSE_ENOUGH = 0.02
_STRAIGHT = 6
_DATA = "my.jsonl"


@dataclass(frozen=True)
class Row:
    """One method, with or without checkpointing."""

    method: str
    checkpointing: bool
    batch_size: int
    prediction: Prediction | None
    """None where it cannot be predicted."""
    problem: str | None
    """Why it cannot."""
    fits: bool | None
    longest: int | None
    """Tokens of the longest sequence that would fit; None where none does."""
    command: str
    """What to type."""


@dataclass(frozen=True)
class Plan:
    """What each method needs of a device."""

    model: str
    device: str
    memory_bytes: int
    sequence_length: int
    rows: list[Row]


def make_plan(
    model: str,
    *,
    sequence_length: int,
    memory_bytes: int,
    device: str,
    methods: Iterable[str] = tuple(METHODS),
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda method: None,
) -> Plan:
    """Predict each method's peak, without and with gradient checkpointing.

    Args:
        model: as in a recipe; its config alone is read.
        sequence_length: tokens of the longest example, each of them with a label.
        memory_bytes: what the device has.
        device: "cpu" or "cuda", which need not be there.
        methods: names of `sbft.methods.METHODS`.
        batch_size: examples in a forward pass; the method's own when None.
        trust_remote_code: run the Python code that comes with the model.
        say: told the method that comes next.

    Raises:
        SbftError: if the model is not found.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    rows = []
    for method in methods:
        say(method)
        for checkpointing in (False, True):
            settings = [f"data.max_length={sequence_length}"]
            settings += [f"training.per_device_train_batch_size={batch_size}"] if batch_size is not None else []
            settings += ["training.gradient_checkpointing=true"] if checkpointing else []
            settings += ["trust_remote_code=true"] if trust_remote_code else []
            recipe = resolve(load_recipe(None, settings, model=model, data=_DATA, method=method))
            command = " ".join(
                [f"sbft train --model {model} --data {_DATA} --method {method}", *(f"--set {one}" for one in settings)]
            )
            rows.append(_row(recipe, config, sequence_length, memory_bytes, device, checkpointing, command))
    return Plan(model, device, memory_bytes, sequence_length, rows)


def _row(
    recipe: Recipe,
    config: PreTrainedConfig,
    sequence_length: int,
    memory_bytes: int,
    device: str,
    checkpointing: bool,
    command: str,
) -> Row:
    size = int(recipe.training["per_device_train_batch_size"])
    try:
        prediction = predict_recipe(recipe, longest=sequence_length, device=device, config=config)
        heap_ratio = prediction.heap_ratio

        def needed(tokens: int) -> int:
            found = predict_recipe(recipe, longest=tokens, device=device, config=config, heap_ratio=heap_ratio)
            return found.needed_bytes

        at_most = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        known = {sequence_length: prediction.needed_bytes}
        kept = sum(prediction.parts[part] for part in ("weights", "optimizer_state", "runtime"))
        longest = None if kept > memory_bytes else longest_that_fits(needed, memory_bytes, at_most, known)
    except SbftError as error:
        return Row(recipe.method, checkpointing, size, None, str(error), None, None, command)
    fits = prediction.needed_bytes <= memory_bytes
    return Row(recipe.method, checkpointing, size, prediction, None, fits, longest, command)


def longest_that_fits(
    needed: Callable[[int], int], memory_bytes: int, at_most: int, known: dict[int, int] | None = None
) -> int | None:
    """The longest sequence whose need is no more than the memory, to within 2 % below; it was itself tried.

    Args:
        needed: bytes for so many tokens, which grow with them.
        memory_bytes: what there is.
        at_most: the most tokens that come into question.
        known: needs that are known already, by tokens.
    """
    known = dict(known or {})

    def fits(tokens: int) -> bool:
        if tokens not in known:
            known[tokens] = needed(tokens)
        return known[tokens] <= memory_bytes

    low = max((tokens for tokens in known if fits(tokens) and tokens <= at_most), default=0)
    high = min((tokens for tokens in known if not fits(tokens)), default=at_most)
    if not low:
        low = min(_MULTIPLE, at_most)
        if not fits(low):
            return None
    high = min(high, at_most)
    if fits(high):
        return high
    for tries in itertools.count():
        step = max(round(_CLOSE_ENOUGH * low), _MULTIPLE)
        if high - low <= step:
            break
        # Where a straight line would end, which is nearly right; halving ends the search where it is not.
        share = (memory_bytes - known[low]) / max(known[high] - known[low], 1) if tries < _STRAIGHT else 0.5
        guess = (low + round((high - low) * share)) // _MULTIPLE * _MULTIPLE
        guess = max(min(guess, high - step), low + step)
        if guess >= high:
            break
        if fits(guess):
            low = guess
        else:
            high = guess
    return low
