"""What fits: every method's predicted peak compared with the available memory, and the longest sequence that fits."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig

from sbft.data.corpus import PYTHON_SOURCES
from sbft.errors import RecipeError, SbftError
from sbft.models.load import load_config
from sbft.models.scratch import is_scratch
from sbft.native.memory import available_bytes
from sbft.planning.memory.offload import HOST_MARGIN_BYTES
from sbft.planning.memory.predict import Prediction, predict_recipe
from sbft.planning.memory.usable import does_it_fit
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.recipe.settings import OPTIMIZERS

_MULTIPLE = 16  # the collator pads to a multiple of this many tokens
_CLOSE_ENOUGH = 0.02
_CURVES = 12
_DATA = "my.jsonl"
_PLANNED = (
    "model", "method", "data", "offload", "weights", "training.gradient_checkpointing", "training.per_device_train_batch_size",
)  # fmt: skip


Verdict = Literal["yes", "tight", "no", "host"]
"""Whether it fits; "host" where it would fit on the device but the host's memory is too small."""


@dataclass(frozen=True)
class Row:
    """One method, with or without checkpointing, with or without layers in the host's memory."""

    method: str
    checkpointing: bool
    offload: bool
    batch_size: int
    prediction: Prediction | None
    """None where it cannot be predicted."""
    problem: str | None
    """Why it cannot be predicted."""
    verdict: Verdict | None
    """Whether it fits."""
    longest: int | None
    """Tokens of the longest sequence that fits; None where none does."""
    command: str
    """The command that trains this way."""

    @property
    def fits(self) -> bool | None:
        """Whether it fits, "tight" included; None where it cannot be predicted."""
        return None if self.verdict is None else self.verdict in ("yes", "tight")


@dataclass(frozen=True)
class Plan:
    """The memory that each method needs on a device."""

    model: str
    device: str
    memory_bytes: int
    host_bytes: int
    """Memory of the host."""
    sequence_length: int
    rows: list[Row]
    note: str | None
    """What the figures leave out."""


def make_plan(
    model: str,
    *,
    sequence_length: int,
    memory_bytes: int,
    device: str,
    host_bytes: int | None = None,
    methods: Iterable[str] = tuple(METHODS),
    batch_size: int | None = None,
    weights: str | None = None,
    overrides: Iterable[str] = (),
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda method: None,
) -> Plan:
    """Predict each method's peak: without and with gradient checkpointing, and on a GPU with streamed layers as well.

    Args:
        model: as in a recipe; only its config is read.
        sequence_length: tokens of the longest example, each with a label.
        memory_bytes: memory of the device.
        device: "cpu" or "cuda", which this machine need not have.
        host_bytes: memory of the host, for streamed layers; that of this machine when None.
        methods: names of `sbft.recipe.methods.METHODS`; methods with adapters are left out for a new model.
        batch_size: examples per forward pass; the method's own when None.
        weights: storage format of the weights; the method's own when None.
        overrides: further settings of all methods, each as "optimizer.sliced_vocabulary=true".
        trust_remote_code: run the Python code that comes with the model.
        say: called with the name of each method before it is planned.

    Raises:
        SbftError: if the model is not found, or a method cannot train weights in this format, or does not take an override, or
            an override is one that the plan decides itself.
    """
    overrides = list(overrides)
    _refuse_planned(overrides)
    config = load_config(model, trust_remote_code=trust_remote_code)
    host_bytes = available_bytes("cpu") if host_bytes is None else host_bytes
    fresh = is_scratch(model)
    data, verb = (PYTHON_SOURCES, "pretrain") if fresh else (_DATA, "train")
    if fresh:
        methods = [method for method in methods if METHODS[method].lora_defaults is None]
    rows = []
    for method in methods:
        say(method)
        for checkpointing, offload in _variants(method, device):
            settings = [f"data.max_length={sequence_length}"]
            settings += [f"training.per_device_train_batch_size={batch_size}"] if batch_size is not None else []
            settings += [f"weights={weights}"] if weights is not None else []
            settings += ["training.gradient_checkpointing=true"] if checkpointing else []
            settings += ["trust_remote_code=true"] if trust_remote_code else []
            settings += overrides
            recipe = resolve(
                load_recipe(
                    None, settings, model=model, data=data, method=method, offload="layers" if offload else None
                )
            )
            command = " ".join(
                [
                    f"sbft {verb} --model {model} --data {data} --method {method}",
                    *(["--offload"] if offload else []),
                    *(f"--set {shlex.quote(setting)}" for setting in settings),
                ]
            )
            rows.append(_row(recipe, config, sequence_length, memory_bytes, host_bytes, device, command))
    return Plan(model, device, memory_bytes, host_bytes, sequence_length, rows, _left_out(config))


def _refuse_planned(overrides: list[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in _PLANNED or key.startswith(("data.", "offload.")):
            raise RecipeError(
                f"--set {key} cannot be planned with: a plan decides on data, checkpointing and streamed layers itself. Model, "
                "methods, length, batch size and weights have flags; sbft check plans for a whole recipe."
            )


def _variants(method: str, device: str) -> list[tuple[bool, bool]]:
    """With or without checkpointing and streamed layers: these need a GPU, and an update within backward or an adapter."""
    variants = [(False, False), (True, False)]
    traits = METHODS[method]
    releases = traits.optimizer in OPTIMIZERS and bool(traits.optimizer_defaults.get("gradient_release"))
    if device == "cuda" and (releases or traits.lora_defaults is not None):
        variants.append((True, True))
    return variants


def _left_out(config: PreTrainedConfig) -> str | None:
    text = config.get_text_config()
    other_inputs = [name for name in type(config).sub_configs if getattr(config, name, None) not in (None, text)]
    if not other_inputs:
        return None
    return (
        f"This model reads more than text ({', '.join(sorted(other_inputs))}). The figures are for training on text alone, "
        "as sbft train does; what images or sound would add is not predicted."
    )


def _row(
    recipe: Recipe,
    config: PreTrainedConfig,
    sequence_length: int,
    memory_bytes: int,
    host_bytes: int,
    device: str,
    command: str,
) -> Row:
    size = int(recipe.training["per_device_train_batch_size"])
    variant = bool(recipe.training.get("gradient_checkpointing")), recipe.offloaded is not None
    try:
        prediction = predict_recipe(recipe, longest=sequence_length, device=device, config=config)
        heap_ratio = prediction.heap_ratio

        def needed(tokens: int) -> int:
            prediction_at_length = predict_recipe(
                recipe, longest=tokens, device=device, config=config, heap_ratio=heap_ratio
            )
            return prediction_at_length.needed_bytes

        at_most = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        known = {sequence_length: prediction.needed_bytes}
        kept = sum(prediction.parts[part] for part in ("weights", "optimizer_state", "runtime"))
        longest = None if kept > memory_bytes else longest_that_fits(needed, memory_bytes, at_most, known)
    except SbftError as error:
        return Row(recipe.method, *variant, size, None, str(error), None, None, command)
    verdict: Verdict = does_it_fit(prediction.needed_bytes, memory_bytes)
    if prediction.streaming is not None and verdict != "no":
        verdict = "host" if prediction.streaming.host_bytes + HOST_MARGIN_BYTES > host_bytes else verdict
    return Row(recipe.method, *variant, size, prediction, None, verdict, longest, command)


def longest_that_fits(
    needed: Callable[[int], int], memory_bytes: int, at_most: int, known: dict[int, int] | None = None
) -> int | None:
    """The longest sequence that fits into memory, or one at most 2 % shorter. Its need was computed, not interpolated.

    Args:
        needed: bytes needed at a number of tokens: the maximum over phases, each linear or quadratic in the tokens.
        memory_bytes: memory of the device.
        at_most: the longest sequence considered.
        known: needs that are already known, by tokens.
    """
    known = dict(known or {})
    for tries in itertools.count():
        low = max((tokens for tokens, need in known.items() if need <= memory_bytes and tokens <= at_most), default=0)
        high = min((tokens for tokens, need in known.items() if need > memory_bytes), default=at_most + 1)
        high = min(high, at_most + 1)
        step = max(round(_CLOSE_ENOUGH * low), _MULTIPLE)
        if low == at_most or high - low <= (step if high <= at_most else 1):
            return low or None
        crossing = _crossing(known, memory_bytes) if tries < _CURVES else (low + high) / 2
        guess = min(int(crossing), high - 1)
        if guess < at_most:
            guess = guess // _MULTIPLE * _MULTIPLE
            # Away from the known lengths, so that every try narrows the range.
            guess = min(max(min(guess, high - step), low + step if low else _MULTIPLE), at_most)
        if guess in known:
            return low or None
        known[guess] = needed(guess)
    raise AssertionError


def _crossing(known: dict[int, int], memory_bytes: int) -> float:
    """The length at which the need reaches the memory, by interpolation.

    It takes the parabola through the three known lengths with the nearest needs, because every phase's need is a parabola.
    """
    nearest = sorted(known, key=lambda tokens: abs(known[tokens] - memory_bytes))[:3]
    if len(nearest) < 2:
        tokens = nearest[0] if nearest else _MULTIPLE
        return tokens * 2 if known.get(tokens, 0) <= memory_bytes else tokens / 2
    x, *neighbours = nearest
    slopes = [(known[tokens] - known[x]) / (tokens - x) for tokens in neighbours]
    bend = 0.0 if len(neighbours) == 1 else (slopes[1] - slopes[0]) / (neighbours[1] - neighbours[0])
    slope = slopes[0] - bend * (neighbours[0] - x)
    rest = memory_bytes - known[x]
    root = slope**2 + 4 * bend * rest
    if slope <= 0 and rest < 0:
        return 0.0  # no length is short enough, unless the shortest is
    if slope <= 0 or root < 0:
        return x * 2 if rest > 0 else x / 2
    return x + 2 * rest / (slope + math.sqrt(root))
