"""Whether the noise of rounding to a grid outweighs what training does to the weights, estimated without reading a weight.

All quantities are in units of a weight's RMS. A relative step of rate r moves the elements of a weight by r (RMS). The grid's
spacing s is a block's scale: its largest value divided by the largest code. Stochastic rounding moves an element to the next
grid value with probability f = r / s. That adds noise of variance s^2 f (1 - f) per step: at most s r, and at most s^2 / 4.

Over a run whose rates add up to D, the noise adds up to

    noise = sqrt(sum of min(s r, s^2 / 4)), which is sqrt(s D) where steps are smaller than the spacing

and no weight travels farther than D. So a run can go wrong in two ways:

- noise / D = sqrt(s / D) is large: rates are so small, and steps so few, that noise is most of what changes the weights.
- noise is not small compared with 1: there are so many steps that noise replaces the weights.

In a simulation (1,000 steps at 1e-3, D = 1) the noise was 0.535 with 4 bits, 0.148 with 8 and 0.023 with 12. The formula
gives 0.57, 0.15 and 0.021.

No weight is read, so the spacing is that of normally distributed weights. Outliers make it larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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

# Both limits are twice what was measured to do no harm. With 4 bits, 400 steps at 1e-4 (warm-up and linear decay) have a noise
# of 4.1 times D, and 400 at 3e-4 a noise of 0.14. SmolLM2-135M then got 0.905 and 0.895 of its answers right, and 0.910 in
# bfloat16.
MOST_NOISE_BESIDE_DISTANCE = 8.0
# More than the 0.14 above; 200 steps at 1e-3 have 0.18, and lost 19 points to bfloat16 (benchmarks/README.md).
MOST_NOISE = 0.15
_SAMPLED_STEPS = 1000
_FINER = {"int4": "int8", "int8": "int12", "int12": "bfloat16"}


def spacing(grid: Grid, block: int) -> float:
    """Distance between neighbouring values of a grid, in units of the RMS of normally distributed weights.

    Args:
        grid: the grid.
        block: elements that share a scale. The scale follows from the median of the largest among that many.
    """
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / block)) / 2) / grid.largest


@dataclass(frozen=True)
class Travel:
    """How far a run's steps move the weights, in units of a weight's RMS."""

    rates: tuple[float, ...]
    """Learning rates sampled evenly over the run, each standing for `steps_each` steps."""
    steps_each: float

    @property
    def distance(self) -> float:
        """The farthest that a weight can travel: the sum of all rates."""
        return sum(self.rates) * self.steps_each

    def noise(self, grid_spacing: float) -> float:
        """RMS of the noise that rounding adds over the run."""
        variance = sum(min(grid_spacing * rate, grid_spacing**2 / 4) for rate in self.rates)
        return math.sqrt(variance * self.steps_each)

    def times(self, factor: float) -> Travel:
        """The same run with all rates multiplied by `factor`."""
        return Travel(tuple(rate * factor for rate in self.rates), self.steps_each)


def travel(prepared: Prepared) -> Travel:
    """How far the steps of a run move the weights, from its learning rate and schedule."""
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
        return None  # reported by the prediction of its memory
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if isinstance(weight, GridWeight) and weight.requires_grad
    }
    for grid in sorted({weight.grid.name for weight in weights.values()}, key=lambda name: NAMED[name].bits):
        names = [name for name, weight in weights.items() if weight.grid.name == grid]
        widest = max(spacing(weights[name].grid, weights[name].quantized.block) for name in names)
        if (finding := _finding(known, way, grid, widest, names)) is not None:
            return finding
    return None


def _finding(known: Known, way: Travel, grid: str, widest: float, names: list[str]) -> Finding | None:
    prepared = known.prepared
    noise, distance, rate = way.noise(widest), way.distance, prepared.arguments.learning_rate
    steps = run_length(prepared).steps
    finer = f"--weights {_FINER[f'int{NAMED[grid].bits}']}"
    if noise > MOST_NOISE:
        return Finding(
            "grid-noise-too-large",
            "warning",
            f"{steps:,} steps at {rate:g} add much noise to weights in {grid}",
            f"Rounding to the grid adds noise of about {noise:.0%} of a weight's RMS, in {_named(names)}. No run with more "
            f"than {MOST_NOISE:.0%} is known to train well. Noise grows with the square root of rate times steps. (Estimated "
            "for normally distributed weights, without reading them.)",
            finer,
        )
    if noise <= MOST_NOISE_BESIDE_DISTANCE * distance:
        return None
    # The noise is at most sqrt(s D), so this rate is enough.
    enough = rate * widest / (MOST_NOISE_BESIDE_DISTANCE**2 * distance)
    enough = _rounded_up(enough)
    return Finding(
        "grid-noise-outweighs-steps",
        "warning",
        f"{steps:,} steps at {rate:g} are lost in the noise of weights in {grid}",
        f"Rounding to the grid adds noise {noise / distance:.0f} times as large as the farthest distance a weight can travel, "
        f"in {_named(names)}. With learning_rate {enough:g} or more it is at most {MOST_NOISE_BESIDE_DISTANCE:g} times. "
        "(Estimated for normally distributed weights, without reading them.)",
        f"--set training.learning_rate={enough:g}" if way.times(enough / rate).noise(widest) <= MOST_NOISE else finer,
    )


def _rounded_up(value: float) -> float:
    """Round up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _named(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first} and {len(rest):,} other weights" if len(rest) > 1 else " and ".join([first, *rest])
