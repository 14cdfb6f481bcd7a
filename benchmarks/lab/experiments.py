"""The suites of the paper's experiments (arXiv 2507.07101), at a size that a budget allows.

    python -m benchmarks.lab.experiments --budget cpu --output runs/lab-cpu/suites

writes a suite for each experiment; `sbft bench SUITE --output-dir runs/lab-cpu` runs it. All suites share one folder of
runs, so runs that two experiments have in common are made once. benchmarks/lab/run.sh does all of it;
benchmarks/lab/figures.py draws the figures.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sbft.tokens import beta_from_half_life, half_life_from_beta

TASK = "corpus"
LENGTH = 512  # tokens per window
BETA2 = 0.95  # the usual one, per step
LARGEST_MICROBATCH = 64


@dataclass(frozen=True)
class Budget:
    """What a machine has time for."""

    model: str
    data: str
    train_tokens: int
    batches: tuple[int, ...]
    reference_batch: int
    """The batch size at which the usual beta2 has the half-life of these runs: a tenth to a twentieth of their tokens. The
    paper's is 10 of 600 million tokens; with so few tokens, that would be less than a step of the larger batches."""
    rates: int
    """Number of learning rates in each grid, half a decade apart."""
    seeds: tuple[int, ...]
    """Seeds of the figures; the learning rates are chosen with seed 0."""
    optimizers: tuple[str, ...]
    experiments: tuple[str, ...]
    takes: str
    betas1: tuple[float, ...] = (0.0, 0.5, 0.9, 0.95, 0.99)
    shift: int = 0
    """Half-decades to move all grids by: with more tokens, the best rates are lower."""
    on_gpu: bool = False
    """Whether steps are launched as graphs, with products in TF32."""

    @property
    def half_life(self) -> int:
        """Half-life of second moments, in tokens."""
        return round(half_life_from_beta(BETA2, self.reference_batch * LENGTH))


OF_THE_PAPER = ("sgd", "adam", "adafactor", "muon")
CANDIDATES = ("sinkgd", "spectral", "row-adafactor")
"""Further optimizers, with no more state than Adafactor."""
BATCHES = (1, 4, 16, 64, 256, 1024)
ALL = ("batch-size", "half-life", "momentum", "robustness", "rounding", "schedule")
_SHORT = Budget(
    "scratch:0.4m", "builtin:python-stdlib", 500_000, (1, 64), 8, 3, (1,), OF_THE_PAPER,
    ("batch-size", "half-life", "momentum", "rounding"), "an hour on 2 cores",
)  # fmt: skip
BUDGETS = {
    "short": _SHORT,
    # All experiments at that size; in the same folder, runs of `short` are not repeated.
    "evening": replace(
        _SHORT, batches=(1, 8, 64), optimizers=(*OF_THE_PAPER, *CANDIDATES), experiments=ALL,
        takes="three to four hours on 2 cores",
    ),  # fmt: skip
    # Without the candidate that was no better than Adafactor with half the tokens.
    "cpu": Budget(
        "scratch:0.4m", "builtin:python-stdlib", 2048 * LENGTH, BATCHES[:-1], 16, 3, (1, 2), (*OF_THE_PAPER, *CANDIDATES[:2]),
        ALL, "a night on 2 cores",
    ),
    # The usual 20 tokens per parameter, so that large batches have enough steps too.
    "gpu-small": Budget(
        "scratch:0.4m", "builtin:python-stdlib", 16 * 1024 * LENGTH, BATCHES, 64, 4, (1, 2), (*OF_THE_PAPER, *CANDIDATES), ALL,
        "an afternoon on one GPU", shift=-1, on_gpu=True,
    ),
    "gpu": Budget(
        "scratch:30m", "builtin:python-stdlib", 30 * 1024 * LENGTH, BATCHES, 128, 4, (1, 2, 3),
        (*OF_THE_PAPER, *CANDIDATES), ALL, "a day on one GPU, no run above ten minutes", on_gpu=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Optimizer:
    """An optimizer in the comparison, in float32; second moments have a half-life in tokens."""

    method: str
    lowest_rate: float
    """The lowest rate of the grid at batch size 1."""
    settings: dict[str, Any] = field(default_factory=dict)
    second_moments: bool = True
    exponent: float = 0.3
    """The grid rises with this power of the batch size, rounded to half-decades; 0 if the best rates of pilot runs did not
    rise."""

    def grid(self, batch: int, count: int, shift: int = 0) -> list[float]:
        """A grid of `count` rates, half a decade apart, moved by `shift` half-decades."""
        lowest = round(2 * math.log10(self.lowest_rate)) + round(2 * self.exponent * math.log10(batch)) + shift
        return [float(f"{3 if i % 2 else 1}e{i // 2}") for i in range(lowest, lowest + count)]


_FLOAT32_ITERATIONS = {"optimizer.newton_schulz_dtype": "float32"}
OPTIMIZERS = {
    "sgd": Optimizer("sgd", 1e-1, second_moments=False, exponent=0.25),
    "adam": Optimizer("adam", 1e-3),
    # The smallest model's matrices are 96 wide; by default they would not be factored.
    "adafactor": Optimizer("sbft", 3e-2, {"optimizer.min_dim_size_to_factor": 32}, exponent=0.0),
    "muon": Optimizer("muon", 3e-3, _FLOAT32_ITERATIONS),
    "sinkgd": Optimizer("sinkgd", 3e-4, exponent=0.15),
    "spectral": Optimizer(
        "muon", 3e-3, {**_FLOAT32_ITERATIONS, "optimizer.momentum": 0.0, "optimizer.rest_optimizer": "adafactor"}
    ),
    "row-adafactor": Optimizer("row-adafactor", 3e-2, exponent=0.0),
}


def batch_settings(batch: int, on_gpu: bool = False) -> dict[str, Any]:
    """Settings of a batch size; batches above the largest microbatch are accumulated."""
    micro = min(batch, LARGEST_MICROBATCH)
    graphs = {"optimizer.cuda_graphs": True, "optimizer.gradient_release": True} if micro == batch else {}
    return {
        **({"training.tf32": True, **graphs} if on_gpu else {}),
        "training.per_device_train_batch_size": micro,
        "training.gradient_accumulation_steps": batch // micro,
        "training.logging_steps": max(256 // batch, 1),
    }


FLOAT32 = {"dtype": "float32", "optimizer.stochastic_rounding": False, "optimizer.gradient_release": False}


def variant(name: str, batch: int, budget: Budget, shift: int = 0, more: int = 0, **changes: Any) -> dict[str, Any]:
    """An optimizer at a batch size, its grid moved by `shift` half-decades and with `more` rates.

    `changes` override its settings; None removes a setting.
    """
    optimizer = OPTIMIZERS[name]
    second = {"optimizer.second_moment_half_life": budget.half_life} if optimizer.second_moments else {}
    settings = {**FLOAT32, **second, **optimizer.settings, **batch_settings(batch, budget.on_gpu), **changes}
    return {
        "method": optimizer.method,
        "set": {key: value for key, value in settings.items() if value is not None},
        "learning_rates": optimizer.grid(batch, budget.rates + more, budget.shift + shift),
    }


def batch_size(budget: Budget) -> dict[str, Any]:
    """a. Loss against batch size for every optimizer (their Figure 1a)."""
    return {f"{name}-{batch}": variant(name, batch, budget) for name in budget.optimizers for batch in budget.batches}


def half_life(budget: Budget) -> dict[str, Any]:
    """b. beta2 fixed per step against a fixed half-life in tokens (their Figure 4)."""
    fixed = {"optimizer.second_moment_half_life": None, "optimizer.beta2": BETA2}
    variants = {}
    for batch in budget.batches:
        variants[f"adam-{batch}"] = variant("adam", batch, budget)
        if batch != budget.reference_batch:  # there the two are the same
            variants[f"adam-beta2-fixed-{batch}"] = variant("adam", batch, budget, **fixed)
    return variants


def momentum(budget: Budget) -> dict[str, Any]:
    """c. SGD without momentum against Adam at batch size 1, and what momentum is worth there and at a large batch."""
    variants = {}
    for batch in (1, min(256, budget.batches[-1])):
        variants[f"sgd-{batch}"] = variant("sgd", batch, budget)
        # The momentum is an average, not a sum: a rate means the same, and higher rates are stable.
        variants[f"sgd-momentum-{batch}"] = variant("sgd", batch, budget, shift=1, **{"optimizer.momentum": 0.9})
        variants[f"adam-{batch}"] = variant("adam", batch, budget)
    return variants


def robustness(budget: Budget) -> dict[str, Any]:
    """d. Loss over learning rate and beta1, at batch size 1 and at the largest (their Figure 1b)."""
    return {
        f"adam-beta1-{beta1}-{batch}": variant("adam", batch, budget, shift=-1, more=2, **{"optimizer.beta1": beta1})
        for batch in (1, budget.batches[-1])
        for beta1 in budget.betas1
    }


def rounding(budget: Budget) -> dict[str, Any]:
    """e. bfloat16 weights rounded to the nearest, stochastically, and float32, at batch size 1."""
    variants = {}
    for name in ("adam", "adafactor", *(name for name in CANDIDATES if name in budget.optimizers)):
        variants[f"{name}-1"] = variant(name, 1, budget)
        for kind, stochastic in (("nearest", False), ("stochastic", True)):
            changes = {"dtype": "bfloat16", "optimizer.stochastic_rounding": stochastic}
            variants[f"{name}-{kind}-1"] = variant(name, 1, budget, **changes)
    return variants


def schedule(budget: Budget) -> dict[str, Any]:
    """f. A batch that doubles from 1 to 64, beta2 following the half-life in tokens or left alone, and constant batches."""
    windows = budget.train_tokens // LENGTH
    # Seven sizes from 1 to 64, each for the same number of examples, the last for twice that.
    doubling = {"batch_schedule.doubling_examples": windows // 8, "batch_schedule.largest": LARGEST_MICROBATCH}
    kinds: dict[str, dict[str, Any]] = {"": {}}
    for batch in (1, LARGEST_MICROBATCH):
        beta2 = beta_from_half_life(budget.half_life, batch * LENGTH)
        kinds[f"-beta2-of-{batch}"] = {"optimizer.second_moment_half_life": None, "optimizer.beta2": beta2}
    variants = {}
    for name in ("adam", "adafactor"):
        for batch in (1, 16, LARGEST_MICROBATCH):
            variants[f"{name}-{batch}"] = variant(name, batch, budget)
        for kind, changes in kinds.items():
            key = f"{name}-doubling{kind}-to-{LARGEST_MICROBATCH}"
            variants[key] = variant(name, 1, budget, **doubling, **changes)
    return variants


EXPERIMENTS = {
    "batch-size": batch_size,
    "half-life": half_life,
    "momentum": momentum,
    "robustness": robustness,
    "rounding": rounding,
    "schedule": schedule,
}


def suite(name: str, budget: Budget) -> dict[str, Any]:
    """The suite of an experiment, as its YAML."""
    experiment = EXPERIMENTS[name]
    methods = experiment(budget)
    return {
        "summary": f"{(experiment.__doc__ or '').splitlines()[0]} {budget.model}, {budget.train_tokens:,} tokens; "
        f"second moments: half-life {budget.half_life:,} tokens.",
        "models": [budget.model],
        "tasks": {
            TASK: {
                "data": {"train": budget.data, "max_length": LENGTH, "train_tokens": budget.train_tokens},
                "evaluation": {"before": False, "batch_size": 16},
            }
        },
        "methods": methods,
        "baseline": next(iter(methods)),
        # The heat maps show the search itself.
        "seeds": list(budget.seeds[:1] if name == "robustness" else budget.seeds),
        "search_seeds": [0],
        "training": {"lr_scheduler_type": "cosine", "warmup_steps": 0.05},
        "time_limit_s": 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    takes = "; ".join(f"{name}: {budget.takes}" for name, budget in BUDGETS.items())
    parser.add_argument("--budget", choices=BUDGETS, default="short", help=takes)
    parser.add_argument("--data", help="another corpus, as data.train of a recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder for the suites")
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    if arguments.data:
        budget = replace(budget, data=arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in budget.experiments:
        path = arguments.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(suite(name, budget), sort_keys=False, width=120))
        print(path)


if __name__ == "__main__":
    main()
