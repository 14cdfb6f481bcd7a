"""Whether the noise of rounding to a grid outweighs what a run does to the weights, known before any weight is read.

The rule, in units of a weight's RMS. A relative step of rate r moves the elements of a weight by r (RMS). The grid's spacing s
is a block's scale: its largest value over the largest code. Rounded without bias, an element moves to the next value on the
grid with the probability f = r / s. That adds noise of variance s^2 f (1 - f) per step: at most s r, and at most s^2 / 4.

Over a run whose rates add up to D, the noise adds up to

    noise = sqrt(sum of min(s r, s^2 / 4)), which is sqrt(s D) where steps are smaller than the spacing

and no weight travels farther than D. So a run is at risk at both ends:

- noise / D = sqrt(s / D) is large: rates are so small, and steps so few, that the weights change by noise alone.
- noise is large beside 1: steps are so many that the weights themselves become noise.

By simulation (1,000 steps at 1e-3, D = 1) the noise was 0.535 with 4 bits, 0.148 with 8 and 0.023 with 12. The rule says 0.57,
0.15 and 0.021.

The spacing is that of normally distributed weights, because no weight is read: outliers make it larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sbft.errors import SbftError
from sbft.grid.formats import NAMED, Grid
from sbft.grid.weight import GridWeight
from sbft.planning.check.finding import Finding
from sbft.planning.check.length import run_length
from sbft.planning.check.model import Known
from sbft.planning.memory.skeleton import skeleton
from sbft.recipe.methods import METHODS
from sbft.runs.prepare import Prepared

# Both limits are twice what a run is known to bear. With 4 bits, 400 steps at 1e-4 (warm-up and linear decay) have a noise of
# 4.1 times D, and 400 at 3e-4 a noise of 0.14. SmolLM2-135M then got 0.905 and 0.895 of its answers right, 0.910 in bfloat16.
MOST_NOISE_BESIDE_DISTANCE = 8.0
MOST_NOISE = 0.3
_SAMPLED_STEPS = 1000
_FINER = {"int4": "int8", "int8": "int12", "int12": "bfloat16"}


def spacing(grid: Grid, block: int) -> float:
    """What two neighbouring values of a grid differ by, in units of the RMS of normally distributed weights.

    Args:
        grid: the grid.
        block: elements under one scale; the largest of so many has its median where it is taken to be.
    """
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / block)) / 2) / grid.largest


@dataclass(frozen=True)
class Travel:
    """What a run's steps come to, in units of a weight's RMS."""

    rates: tuple[float, ...]
    """The rates of steps spread over the run, each standing for `steps_each` of them."""
    steps_each: float

    @property
    def distance(self) -> float:
        """The farthest that a weight can travel: the sum of all rates."""
        return sum(self.rates) * self.steps_each

    def noise(self, grid_spacing: float) -> float:
        """RMS of the noise that rounding adds on the way."""
        variance = sum(min(grid_spacing * rate, grid_spacing**2 / 4) for rate in self.rates)
        return math.sqrt(variance * self.steps_each)

    def times(self, factor: float) -> Travel:
        """The same with all rates multiplied."""
        return Travel(tuple(rate * factor for rate in self.rates), self.steps_each)


def travel(prepared: Prepared) -> Travel:
    """What the steps of a run come to, by its rate and schedule."""
    arguments, steps = prepared.arguments, max(run_length(prepared).steps, 1)
    kwargs = arguments.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=kwargs if isinstance(kwargs, dict) else {},
    )
    count = min(steps, _SAMPLED_STEPS)
    at = [index * steps // count for index in range(count)]
    factors = [schedule.lr_lambdas[0](step) for step in at] if isinstance(schedule, LambdaLR) else [1.0] * count
    return Travel(tuple(arguments.learning_rate * factor for factor in factors), steps / count)


def grid_noise(known: Known) -> Finding | None:
    """A grid whose noise outweighs the movement of the weights on it, or the weights themselves."""
    recipe = known.prepared.recipe
    relative = METHODS[recipe.method].optimizer in ("adafactor", "row_adafactor") and recipe.optimizer.relative_step
    if recipe.grids is None or not relative or not recipe.optimizer.stochastic_rounding:
        return None
    way = travel(known.prepared)
    if way.distance <= 0:
        return None
    try:
        model = skeleton(recipe, known.config)
    except SbftError:
        return None  # which the prediction of its memory tells
    weights = [
        (weight.grid.name, spacing(weight.grid, weight.quantized.block), name)
        for name, weight in model.named_parameters()
        if isinstance(weight, GridWeight) and weight.requires_grad
    ]
    for name, group in groupby(sorted(weights, key=lambda one: _by_bits(one[0])), key=lambda one: one[0]):
        members = list(group)
        widest = max(each for _, each, _ in members)
        if (finding := _finding(known, way, name, widest, [each for *_, each in members])) is not None:
            return finding
    return None


def _by_bits(name: str) -> int:
    return NAMED[name].bits


def _finding(known: Known, way: Travel, grid: str, widest: float, names: list[str]) -> Finding | None:
    prepared = known.prepared
    noise, distance, rate = way.noise(widest), way.distance, prepared.arguments.learning_rate
    steps = run_length(prepared).steps
    finer = f"--weights {_FINER[f'int{_by_bits(grid)}']}"
    if noise > MOST_NOISE:
        return Finding(
            "grid-noise-too-large",
            "warning",
            f"{steps:,} steps at {rate:g} add much noise to weights in {grid}",
            f"Rounding to the grid adds noise of about {noise:.0%} of a weight's RMS, in {_named(names)}. No run with more "
            f"than {MOST_NOISE:.0%} is known to train well. It grows with the square root of rate times steps. (For normally "
            "distributed weights; none was read.)",
            finer,
        )
    if noise <= MOST_NOISE_BESIDE_DISTANCE * distance:
        return None
    # As the noise is at most sqrt(s D), this much is enough.
    enough = rate * widest / (MOST_NOISE_BESIDE_DISTANCE**2 * distance)
    enough = _rounded_up(enough)
    return Finding(
        "grid-noise-outweighs-steps",
        "warning",
        f"{steps:,} steps at {rate:g} are lost in the noise of weights in {grid}",
        f"Rounding to the grid adds noise {noise / distance:.0f} times as large as the farthest that a weight can travel, in "
        f"{_named(names)}. From learning_rate {enough:g} on it is at most {MOST_NOISE_BESIDE_DISTANCE:g} times. (For normally "
        "distributed weights; none was read.)",
        f"--set training.learning_rate={enough:g}" if way.times(enough / rate).noise(widest) <= MOST_NOISE else finer,
    )


def _rounded_up(value: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _named(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest):,} other weights" if len(rest) > 1 else " and ".join([first, *rest])
